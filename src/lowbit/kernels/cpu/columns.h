// The column loop of GPTQ and of its refinement (algorithms/gptq.py), for a block of columns at once: round a column to
// its grid, and let the columns after it take up what that changed. And what many scales would each cost, for the search.
//
// Rows of the weight do not see each other, so they are the lanes: a strip of 64 rows is copied beside itself (128
// columns of it fill a first cache) and worked through column by column. Every operation is one that IEEE 754 fixes to
// the last bit, in one order: each instruction set, and the torch twin, gives the same codes.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace lowbit {
namespace LOWBIT_ISA {

constexpr int kStrip = 64, kLanes = kStrip / 16, kErrorColumns = 128;

LB_INLINE F16 round_even(F16 x) {  // |x| up to 2^22; larger values are beyond every grid
  const F16 limit = splat(2097152.f), magic = splat(12582912.f);
  return (vmax(vmin(x, limit), -limit) + magic) - magic;
}

// The value of an e4m3 number next to y, saturating.
LB_INLINE F16 nearest_fp8(F16 y) {
  y = vmax(vmin(y, splat(448.f)), splat(-448.f));
  const F16 power = bits<F16>(bits<I16>(y) & splat_i(0x7f800000));
  const F16 quantum = vmax(power * splat(0.125f), splat(0.001953125f));
  return round_even(y / quantum) * quantum;
}

LB_INLINE void load_lanes(const float* p, int count, float fill, float* to) {
  for (int i = 0; i < kStrip; ++i) to[i] = i < count ? p[i] : fill;
}

LB_INLINE void load_table(const Sweep& s, int row, int count, float* levels, float* middles) {
  for (int e = 0; e < s.entries; ++e) {
    load_lanes(s.table + (size_t)e * s.out + row, count, 0.f, levels + (size_t)e * kStrip);
    if (e)
      for (int i = 0; i < kStrip; ++i)
        middles[(size_t)(e - 1) * kStrip + i] = (levels[(size_t)e * kStrip + i] + levels[(size_t)(e - 1) * kStrip + i]) / 2;
  }
}

// One lane vector's values next to x; scale, zero: its lanes of the column; levels, middles: its lanes of the table.
LB_INLINE F16 nearest(const Sweep& s, F16 x, F16 scale, const float* zero, const float* levels, const float* middles) {
  const F16 y = x / scale;
  if (s.kind == Grid::kFp8) return nearest_fp8(y) * scale;
  if (s.kind == Grid::kTable) {
    F16 value = load<F16>(levels);
    for (int e = 1; e < s.entries; ++e) {
      const I16 above = y > load<F16>(middles + (size_t)(e - 1) * kStrip);
      value = bits<F16>((above & bits<I16>(load<F16>(levels + (size_t)e * kStrip))) | (~above & bits<I16>(value)));
    }
    return value * scale;
  }
  F16 code = round_even(y);
  if (!zero) return vmax(vmin(code, splat(s.highest)), splat(s.lowest)) * scale;
  const F16 z = load<F16>(zero);
  code = vmax(vmin(code + z, splat(s.highest)), splat(s.lowest));
  return (code - z) * scale;
}

size_t sweep_scratch(const Sweep& s) {
  return ((size_t)s.columns * 2 + (size_t)s.scales * 2 + (size_t)s.entries * 2) * kStrip * sizeof(float);
}

void sweep_strip(const Sweep& s, int row, float* scratch) {
  const int n = s.columns, count = s.out - row < kStrip ? s.out - row : kStrip;
  float* x = scratch;  // slopes
  float* value = x + (size_t)n * kStrip;
  float* scale = value + (size_t)n * kStrip;
  float* zero = scale + (size_t)s.scales * kStrip;
  float* levels = zero + (size_t)s.scales * kStrip;
  float* middles = levels + (size_t)s.entries * kStrip;
  for (int i = 0; i < n; ++i) {
    load_lanes(s.x + (size_t)i * s.out + row, count, 0.f, x + (size_t)i * kStrip);
    load_lanes(s.value + (size_t)i * s.out + row, count, 0.f, value + (size_t)i * kStrip);
  }
  for (int k = 0; k < s.scales; ++k) {
    load_lanes(s.scale + (size_t)k * s.out + row, count, 1.f, scale + (size_t)k * kStrip);
    if (s.zero) load_lanes(s.zero + (size_t)k * s.out + row, count, 0.f, zero + (size_t)k * kStrip);
  }
  load_table(s, row, count, levels, middles);
  for (int i = 0; i < n; ++i) {
    const float* m = s.matrix + (size_t)i * n;
    const F16 corner = splat(m[i]);
    const size_t k = (size_t)s.index[i] * kStrip, at = (size_t)i * kStrip;
    F16 change[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const F16 before = load<F16>(value + at + 16 * l), wanted = before + load<F16>(x + at + 16 * l) / corner;
      const F16 found = nearest(s, wanted, load<F16>(scale + k + 16 * l), s.zero ? zero + k + 16 * l : nullptr,
                                levels + 16 * l, middles + 16 * l);
      change[l] = found - before;
      store(value + at + 16 * l, found);
    }
    for (int j = i + 1; j < n; ++j) {
      const F16 factor = splat(m[j]);
      float* later = x + (size_t)j * kStrip;
      for (int l = 0; l < kLanes; ++l) store(later + 16 * l, load<F16>(later + 16 * l) - factor * change[l]);
    }
  }
  for (int i = 0; i < n; ++i) {
    std::memcpy(s.value + (size_t)i * s.out + row, value + (size_t)i * kStrip, (size_t)count * sizeof(float));
    std::memcpy(s.x + (size_t)i * s.out + row, x + (size_t)i * kStrip, (size_t)count * sizeof(float));
  }
}

// error[c][row] = sum over columns of weight * (what the c-th scale makes of x - x)^2, columns in order. 128 columns of a
// strip stay in the first cache while all candidates pass over them.
void errors_strip(const Sweep& s, int row, float* scratch) {
  const int count = s.out - row < kStrip ? s.out - row : kStrip;
  float* x = scratch;
  float* error = x + (size_t)kErrorColumns * kStrip;
  float* scale = error + (size_t)s.scales * kStrip;
  float* zero = scale + (size_t)s.scales * kStrip;
  float* levels = zero + (size_t)s.scales * kStrip;
  float* middles = levels + (size_t)s.entries * kStrip;
  std::memset(error, 0, (size_t)s.scales * kStrip * sizeof(float));
  for (int c = 0; c < s.scales; ++c) {
    load_lanes(s.scale + (size_t)c * s.out + row, count, 1.f, scale + (size_t)c * kStrip);
    if (s.zero) load_lanes(s.zero + (size_t)c * s.out + row, count, 0.f, zero + (size_t)c * kStrip);
  }
  load_table(s, row, count, levels, middles);
  for (int first = 0; first < s.columns; first += kErrorColumns) {
    const int n = s.columns - first < kErrorColumns ? s.columns - first : kErrorColumns;
    for (int i = 0; i < n; ++i) load_lanes(s.x + (size_t)(first + i) * s.out + row, count, 0.f, x + (size_t)i * kStrip);
    for (int c = 0; c < s.scales; ++c)
      for (int l = 0; l < kLanes; ++l) {
        const size_t at = (size_t)c * kStrip + 16 * l;
        const F16 step = load<F16>(scale + at);
        F16 sum = load<F16>(error + at);
        for (int i = 0; i < n; ++i) {
          const F16 w = load<F16>(x + (size_t)i * kStrip + 16 * l);
          const F16 d = nearest(s, w, step, s.zero ? zero + at : nullptr, levels + 16 * l, middles + 16 * l) - w;
          sum += d * d * splat(s.matrix[first + i]);
        }
        store(error + at, sum);
      }
  }
  for (int c = 0; c < s.scales; ++c)
    std::memcpy(s.value + (size_t)c * s.out + row, error + (size_t)c * kStrip, (size_t)count * sizeof(float));
}

size_t errors_scratch(const Sweep& s) {
  return ((size_t)kErrorColumns + (size_t)s.scales * 3 + (size_t)s.entries * 2) * kStrip * sizeof(float);
}

void grid_errors(const Sweep& s, uint8_t* scratch) {
  for (int row = 0; row < s.out; row += kStrip) errors_strip(s, row, (float*)scratch);
}

void sweep(const Sweep& s, uint8_t* scratch) {
  for (int row = 0; row < s.out; row += kStrip) sweep_strip(s, row, (float*)scratch);
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
