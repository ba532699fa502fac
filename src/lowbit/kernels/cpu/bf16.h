// bf16 weights times bf16 activations, float sums.
//
// Two panels (32 rows) lie together: for each pair of columns 128 bytes, vector n holding (w[k], w[k+1]) of panel n's 16
// rows. Every output is one chain of pair products in increasing k, for 1 row or for 512, so prefill and decode agree
// bit for bit; the two panels are two independent chains, which is what hides the latency when there is one row.
#pragma once

#include "fold.h"

namespace lowbit {
namespace LOWBIT_ISA {

template <int M>
LB_INLINE void bf16_tile(const Weight& w, const Act& a, int row0, int pair, int b0, int b1, F16 total[2][M]) {
  const uint8_t* p = w.codes + ((size_t)pair * w.blocks + b0) * (2 * kPanel * kBlock * 2);
  const uint16_t* q = a.bf16 + (size_t)row0 * a.stride + (size_t)b0 * kBlock;
  for (int b = b0; b < b1; ++b, q += kBlock)
    for (int j = 0; j < kBlock / 2; ++j, p += 128) {
      I16 x0 = load<I16>(p), x1 = load<I16>(p + 64);
      for (int m = 0; m < M; ++m) {
        I16 v = splat_i(load_i32(q + (size_t)m * a.stride + 2 * j));
        total[0][m] = dot2_bf16(total[0][m], x0, v);
        total[1][m] = dot2_bf16(total[1][m], x1, v);
      }
    }
}

template <int M>
void bf16_rows(const Weight& w, const Act& a, int row0, int pair, int b0, int b1, float* out, size_t ldo, bool add,
               float* carry) {
  F16 total[2][M];
  for (int n = 0; n < 2; ++n)
    for (int m = 0; m < M; ++m)
      total[n][m] = b0 ? load<F16>(carry + ((size_t)(row0 + m) * 2 + n) * kPanel) : F16{};
  bf16_tile<M>(w, a, row0, pair, b0, b1, total);
  for (int n = 0; n < 2; ++n)
    for (int m = 0; m < M; ++m) {
      if (b1 < w.blocks)
        store(carry + ((size_t)(row0 + m) * 2 + n) * kPanel, total[n][m]);
      else if ((2 * pair + n) * kPanel < w.rows)
        finish(w, 2 * pair + n, total[n][m], out + (size_t)(row0 + m) * ldo + (2 * pair + n) * kPanel, add);
    }
}

// Depth is cut so that a slab of 32 rows (256 columns: 16 KiB) serves all activation rows from the first cache. What is
// left of the activation rows goes in one pass, whatever its number: two or three sequences that decode together would
// otherwise read all weights once each.
void bf16_linear(const Weight& w, const Act& a, int m, int p0, int p1, float* out, size_t ldo, bool add, float* carry) {
  using Rows = void (*)(const Weight&, const Act&, int, int, int, int, float*, size_t, bool, float*);
  constexpr int kMost = 12;
  static constexpr Rows rows[kMost] = {bf16_rows<1>, bf16_rows<2>, bf16_rows<3>, bf16_rows<4>,  bf16_rows<5>,  bf16_rows<6>,
                                       bf16_rows<7>, bf16_rows<8>, bf16_rows<9>, bf16_rows<10>, bf16_rows<11>, bf16_rows<12>};
  const int step = m <= kMost ? w.blocks : 256 / kBlock;
  for (int pair = p0 / 2; pair < (p1 + 1) / 2; ++pair)
    for (int b0 = 0; b0 < w.blocks; b0 += step) {
      const int b1 = b0 + step < w.blocks ? b0 + step : w.blocks;
      for (int row = 0, n; row < m; row += n) {
        n = m - row < kMost ? m - row : kMost;
        rows[n - 1](w, a, row, pair, b0, b1, out, ldo, add, carry);
      }
    }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
