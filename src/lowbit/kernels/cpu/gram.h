// XᵀX of bf16 rows, the sum that every second-order method starts with: added to a matrix, or multiplied with one entry
// by entry and summed (Σ x H xᵀ = ⟨XᵀX, H⟩ for a symmetric H). Only the lower triangle is made: tiles of 8 x 32 on and
// below the diagonal, panels of 32 columns, each by whoever comes to it (gram.cpp).
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

constexpr int kGramTile = 8;

// Rows 2k and 2k + 1 of X as 32-bit pairs, for one panel; zeros where there is no row or column.
void gram_pack(const uint16_t* x, size_t stride, int rows, int width, int panel, uint32_t* packed) {
  const int pairs = (rows + 1) / 2;
  packed += (size_t)panel * pairs * kGramPanel;
  for (int k = 0; k < pairs; ++k)
    for (int c = 0; c < kGramPanel; c += 16) {
      H16 a = {}, b = {};
      const int j = panel * kGramPanel + c, n = width - j < 16 ? width - j : 16;
      if (n > 0) {
        std::memcpy(&a, x + (size_t)2 * k * stride + j, (size_t)n * 2);
        if (2 * k + 1 < rows) std::memcpy(&b, x + (size_t)(2 * k + 1) * stride + j, (size_t)n * 2);
      }
      store(packed + (size_t)k * kGramPanel + c, widen_u16(a) | (widen_u16(b) << 16));
    }
}

struct GramTile {
  F16 sum[kGramTile][2];
};

// Pairs of 8 columns (from `a`) times pairs of 32 columns (from `b`).
LB_INLINE GramTile gram_products(const uint32_t* a, const uint32_t* b, int pairs) {
  GramTile t = {};
  for (int k = 0; k < pairs; ++k, a += kGramPanel, b += kGramPanel) {
    const I16 x0 = load<I16>(b), x1 = load<I16>(b + 16);
    for (int i = 0; i < kGramTile; ++i) {
      const I16 v = splat_i(load_i32(a + i));
      t.sum[i][0] = dot2_bf16(t.sum[i][0], x0, v);
      t.sum[i][1] = dot2_bf16(t.sum[i][1], x1, v);
    }
  }
  return t;
}

// 16 values of a row of a matrix with `left` columns to go (zeros beyond them).
LB_INLINE F16 load_part(const float* p, int left) {
  F16 v = {};
  if (left > 0) std::memcpy(&v, p, (size_t)(left < 16 ? left : 16) * 4);
  return v;
}

void gram_add(const uint32_t* packed, int rows, int width, int panel, float* sum) {
  const int pairs = (rows + 1) / 2, j0 = panel * kGramPanel, n = width - j0;
  for (int i0 = j0; i0 < width; i0 += kGramTile) {
    const int m = width - i0 < kGramTile ? width - i0 : kGramTile;
    float* out = sum + (size_t)i0 * width + j0;
    for (int i = 0; i < m; ++i) {
      prefetch_write(out + (size_t)i * width);
      prefetch_write(out + (size_t)i * width + (n > 16 ? 16 : 0));
    }
    const GramTile t = gram_products(packed + (size_t)(i0 / kGramPanel) * pairs * kGramPanel + i0 % kGramPanel,
                                     packed + (size_t)panel * pairs * kGramPanel, pairs);
    for (int i = 0; i < m; ++i)
      for (int h = 0; h < 2; ++h) {
        const int left = n - 16 * h;
        if (left <= 0) continue;
        const F16 s = load_part(out + (size_t)i * width + 16 * h, left) + t.sum[i][h];
        std::memcpy(out + (size_t)i * width + 16 * h, &s, (size_t)(left < 16 ? left : 16) * 4);
      }
  }
}

void gram_weighted(const uint32_t* packed, int rows, int width, int panel, const float* const* matrices, int count,
                   double* totals) {
  const int pairs = (rows + 1) / 2, j0 = panel * kGramPanel, n = width - j0;
  for (int i0 = j0; i0 < width; i0 += kGramTile) {
    const int m = width - i0 < kGramTile ? width - i0 : kGramTile;
    GramTile t = gram_products(packed + (size_t)(i0 / kGramPanel) * pairs * kGramPanel + i0 % kGramPanel,
                               packed + (size_t)panel * pairs * kGramPanel, pairs);
    for (int i = 0; i < m; ++i)  // what is left of the diagonal counts for its mirror as well
      for (int h = 0; h < 2; ++h) {
        const int below = i0 + i - j0 - 16 * h;  // columns of this half left of the diagonal
        if (below >= 16) {
          t.sum[i][h] = t.sum[i][h] * 2.f;
          continue;
        }
        float times[16];
        for (int j = 0; j < 16; ++j) times[j] = j < below ? 2.f : j == below ? 1.f : 0.f;
        t.sum[i][h] = t.sum[i][h] * load_part(times, 16);
      }
    for (int k = 0; k < count; ++k) {
      F16 total = {};
      for (int i = 0; i < m; ++i)
        for (int h = 0; h < 2; ++h)
          total = fma(t.sum[i][h], load_part(matrices[k] + (size_t)(i0 + i) * width + j0 + 16 * h, n - 16 * h), total);
      float lanes[16];
      std::memcpy(lanes, &total, sizeof lanes);
      for (float lane : lanes) totals[k] += lane;
    }
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
