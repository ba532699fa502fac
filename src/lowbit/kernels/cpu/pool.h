// A team of threads that runs one function together and meets at barriers.
//
// A decoder token is a hundred short phases; waking threads for each would cost more than the work. So the team enters
// the whole token once (`run`), and inside it phases are separated by `barrier`. Between calls the workers spin for a
// moment and then sleep.
//
// `next` hands out the items of a phase: every thread owns a fixed contiguous range, cut in fixed chunks, and takes from
// its neighbours' when its own is done, so that a core that the system took away does not hold up the others. Who
// computes a chunk never changes what is computed: every output element belongs to one chunk and is summed in one
// fixed order. Results are the same bits for every number of threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace lowbit {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  int size() const { return size_; }
  // f(thread) on every thread, the caller being thread 0; returns when all are done. One caller at a time.
  void run(const std::function<void(int)>& f);
  // Inside run: wait for everyone. Starts a new phase for `next`.
  void barrier();

  struct Range {
    int begin, end;
  };
  // Inside run: the next chunk of a phase of n items in chunks of `grain`; empty when the phase is exhausted.
  Range next(int thread, int n, int grain);

  // LOWBIT_NUM_THREADS, else the CPUs this process may use. Holders keep their team when set_threads makes another.
  static std::shared_ptr<Pool> shared();
  static void set_threads(int n);  // of the shared pool

 private:
  void work(int thread);
  struct alignas(64) Counter {
    std::atomic<int> v{0};
  };
  int size_;
  std::mutex callers_;
  std::vector<std::thread> threads_;
  std::unique_ptr<Counter[]> cursor_;
  const std::function<void(int)>* task_ = nullptr;
  alignas(64) std::atomic<uint64_t> epoch_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint64_t> phase_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> asleep_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

}  // namespace lowbit
