// See pool.h.
#include "pool.h"

#include <cstdlib>

#ifdef __linux__
#include <sched.h>
#endif
#include <unistd.h>

namespace lowbit {

static inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Some microseconds of spinning bridge the gap between two phases; then the core is offered to whoever else may need it
// (perhaps the very thread that is waited for), and between calls, after about a millisecond, the thread sleeps.
constexpr int kSpin = 400, kOffers = 2000;

Pool::Pool(int threads) : size_(threads < 1 ? 1 : threads), cursor_(new Counter[threads < 1 ? 1 : threads]) {
  for (int t = 1; t < size_; ++t) threads_.emplace_back([this, t] { work(t); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(sleep_);
    stop_.store(true);
    epoch_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& t : threads_) t.join();
}

void Pool::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    int spins = 0;
    while (epoch_.load(std::memory_order_acquire) == seen) {
      if (++spins < kSpin) {
        pause();
        continue;
      }
      if (spins < kSpin + kOffers) {
        std::this_thread::yield();
        continue;
      }
      std::unique_lock<std::mutex> lock(sleep_);
      asleep_.fetch_add(1);
      wake_.wait(lock, [&] { return epoch_.load() != seen; });
      asleep_.fetch_sub(1);
    }
    ++seen;
    if (stop_.load()) return;
    (*task_)(thread);
    barrier();
  }
}

void Pool::run(const std::function<void(int)>& f) {
  std::lock_guard<std::mutex> one(callers_);
  for (int i = 0; i < size_; ++i) cursor_[i].v.store(0, std::memory_order_relaxed);
  task_ = &f;
  if (size_ > 1) {
    // Sleepers check the epoch under the mutex, so passing through it after the store means that none can miss it.
    epoch_.fetch_add(1);
    { std::lock_guard<std::mutex> lock(sleep_); }
    if (asleep_.load() > 0) wake_.notify_all();
  }
  f(0);
  barrier();
}

void Pool::barrier() {
  if (size_ == 1) {
    cursor_[0].v.store(0, std::memory_order_relaxed);
    return;
  }
  const uint64_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    for (int i = 0; i < size_; ++i) cursor_[i].v.store(0, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;) {
    if (++spins < kSpin)
      pause();
    else
      std::this_thread::yield();
  }
}

Pool::Range Pool::next(int thread, int n, int grain) {
  for (int i = 0; i < size_; ++i) {
    const int owner = thread + i < size_ ? thread + i : thread + i - size_;
    // Ranges begin at multiples of the grain, so that chunks are the same whoever owns them.
    const int chunks = (n + grain - 1) / grain;
    const int first = (int)((int64_t)chunks * owner / size_), last = (int)((int64_t)chunks * (owner + 1) / size_);
    if (cursor_[owner].v.load(std::memory_order_relaxed) >= last - first) continue;
    const int c = first + cursor_[owner].v.fetch_add(1, std::memory_order_relaxed);
    if (c < last) return {c * grain, (c + 1) * grain < n ? (c + 1) * grain : n};
  }
  return {n, n};
}

static int default_threads() {
  if (const char* s = std::getenv("LOWBIT_NUM_THREADS"))
    if (std::atoi(s) > 0) return std::atoi(s);
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? (int)n : 1;
}

// Threads do not survive a fork: a child starts a team of its own and leaks the parent's, which it could not join.
static std::mutex shared_lock;
static std::shared_ptr<Pool>* shared_pool = nullptr;
static pid_t shared_pid = 0;

static void replace_shared(int n) {
  if (shared_pool && shared_pid == getpid()) delete shared_pool;
  shared_pool = new std::shared_ptr<Pool>(std::make_shared<Pool>(n));
  shared_pid = getpid();
}

std::shared_ptr<Pool> Pool::shared() {
  std::lock_guard<std::mutex> lock(shared_lock);
  if (!shared_pool || shared_pid != getpid()) replace_shared(default_threads());
  return *shared_pool;
}

void Pool::set_threads(int n) {
  std::lock_guard<std::mutex> lock(shared_lock);
  if (shared_pool && shared_pid == getpid() && (*shared_pool)->size() == n) return;
  replace_shared(n < 1 ? default_threads() : n);
}

}  // namespace lowbit
