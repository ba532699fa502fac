#include "gram_threads.h"

#include <atomic>
#include <memory>
#include <thread>

namespace lowbit {

// f(item) for every item, in threads of this call.
template <class F>
static void each(int items, int threads, F f) {
  std::atomic<int> next{0};
  const auto work = [&] {
    for (int i; (i = next.fetch_add(1)) < items;) f(i);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads && t < items; ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

// f(packed, count) for some rows after the other.
template <class F>
static void by_rows(const Kernels& k, const uint16_t* x, int rows, int width, int threads, F f) {
  const int panels = (width + kGramPanel - 1) / kGramPanel;
  const size_t most = (size_t)((rows < kGramRows ? rows : kGramRows) + 1) / 2;
  const std::unique_ptr<uint8_t[]> room(new uint8_t[panels * kGramPanel * most * 4 + 64]);  // not cleared: it is large
  uint32_t* packed = reinterpret_cast<uint32_t*>(room.get() + (64 - (uintptr_t)room.get() % 64) % 64);
  for (int r = 0; r < rows; r += kGramRows) {
    const int count = rows - r < kGramRows ? rows - r : kGramRows;
    each(panels, threads, [&](int p) { k.gram_pack(x + (size_t)r * width, (size_t)width, count, width, p, packed); });
    f(packed, count);
  }
}

void add_gram(const Kernels& k, const uint16_t* x, int rows, int width, float* sum, int threads) {
  by_rows(k, x, rows, width, threads, [&](const uint32_t* packed, int count) {
    each((width + kGramPanel - 1) / kGramPanel, threads, [&](int p) { k.gram_add(packed, count, width, p, sum); });
  });
}

std::vector<double> quadratic_forms(const Kernels& k, const uint16_t* x, int rows, int width,
                                    const std::vector<const float*>& matrices, int threads) {
  const int panels = (width + kGramPanel - 1) / kGramPanel;
  const size_t n = matrices.size();
  std::vector<double> totals(n), parts(n * panels);
  by_rows(k, x, rows, width, threads, [&](const uint32_t* packed, int count) {
    each(panels, threads,
         [&](int p) { k.gram_weighted(packed, count, width, p, matrices.data(), (int)n, parts.data() + n * p); });
  });
  for (size_t i = 0; i < parts.size(); ++i) totals[i % n] += parts[i];
  return totals;
}

}  // namespace lowbit
