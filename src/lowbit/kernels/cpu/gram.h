// S += XᵀX of bf16 rows, the sum that every second-order method starts with. Only the lower triangle is wanted: tiles of
// 8 x 32 on and below the diagonal.
//
// Rows come in pairs, as the dot product of bf16 pairs takes them: 512 rows are packed into panels of 32 columns in which
// the pairs of one row follow each other (32 KiB; with fewer rows the sums are read and written more often). A tile needs
// 10 loads for 16 products.
// Products of bf16 values are exact in float; sums are float, in increasing row.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace lowbit {
namespace LOWBIT_ISA {

constexpr int kGramRows = 512, kGramPanel = 32, kGramTile = 8;

size_t gram_scratch(int width) { return (size_t)(width + kGramPanel - 1) / kGramPanel * kGramPanel * kGramRows * 2 + 64; }

// Rows 2k and 2k + 1 of X as 32-bit pairs, panel by panel; zeros where there is no row or column.
LB_INLINE void pack_pairs(const uint16_t* x, size_t stride, int rows, int width, uint32_t* packed) {
  const int pairs = (rows + 1) / 2;
  for (int k = 0; k < pairs; ++k)
    for (int j = 0; j < (width + kGramPanel - 1) / kGramPanel * kGramPanel; j += 16) {
      H16 a = {}, b = {};
      const int n = width - j < 16 ? width - j : 16;
      if (n > 0) {
        std::memcpy(&a, x + (size_t)2 * k * stride + j, (size_t)n * 2);
        if (2 * k + 1 < rows) std::memcpy(&b, x + (size_t)(2 * k + 1) * stride + j, (size_t)n * 2);
      }
      store(packed + ((size_t)j / kGramPanel * pairs + k) * kGramPanel + j % kGramPanel, widen_u16(a) | (widen_u16(b) << 16));
    }
}

// sum[i0 .. i0 + 8][j0 .. j0 + 32] += pairs of columns i (from `a`) times pairs of columns j (from `b`).
void gram_tile(const uint32_t* a, const uint32_t* b, int pairs, int m, int n, float* sum, size_t ldo) {
  F16 acc[kGramTile][2] = {};
  for (int i = 0; i < m; ++i) {
    prefetch_write(sum + i * ldo);
    prefetch_write(sum + i * ldo + (n > 16 ? 16 : 0));
  }
  for (int k = 0; k < pairs; ++k, a += kGramPanel, b += kGramPanel) {
    const I16 x0 = load<I16>(b), x1 = load<I16>(b + 16);
    for (int i = 0; i < kGramTile; ++i) {
      const I16 v = splat_i(load_i32(a + i));
      acc[i][0] = dot2_bf16(acc[i][0], x0, v);
      acc[i][1] = dot2_bf16(acc[i][1], x1, v);
    }
  }
  for (int i = 0; i < m; ++i)
    for (int h = 0; h < 2; ++h) {
      const int wide = n - 16 * h < 16 ? n - 16 * h : 16;
      if (wide <= 0) continue;
      F16 s = {};
      std::memcpy(&s, sum + i * ldo + 16 * h, (size_t)wide * 4);
      s += acc[i][h];
      std::memcpy(sum + i * ldo + 16 * h, &s, (size_t)wide * 4);
    }
}

void gram(const uint16_t* x, size_t stride, int rows, int width, float* sum, uint8_t* scratch) {
  uint32_t* packed = (uint32_t*)scratch;
  const int panels = (width + kGramPanel - 1) / kGramPanel;
  for (int r = 0; r < rows; r += kGramRows) {
    const int count = rows - r < kGramRows ? rows - r : kGramRows, pairs = (count + 1) / 2;
    pack_pairs(x + (size_t)r * stride, stride, count, width, packed);
    for (int jp = 0; jp < panels; ++jp)
      for (int i0 = jp * kGramPanel; i0 < width; i0 += kGramTile)
        gram_tile(packed + (size_t)(i0 / kGramPanel) * pairs * kGramPanel + i0 % kGramPanel,
                  packed + (size_t)jp * pairs * kGramPanel, pairs, width - i0 < kGramTile ? width - i0 : kGramTile,
                  width - jp * kGramPanel, sum + (size_t)i0 * width + jp * kGramPanel, width);
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
