// Scales and zero points of one panel, and the step from int32 to float ("fold") that every product shares.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace lowbit {
namespace LOWBIT_ISA {

LB_INLINE size_t scale_size(ScaleType t) { return t == ScaleType::kF32 ? 4 : 2; }

LB_INLINE F16 load_scale(const uint8_t* p, ScaleType t) {
  if (t == ScaleType::kBf16) return load_bf16(p);
  if (t == ScaleType::kF16) return load_half(p);
  return load<F16>(p);
}

LB_INLINE const uint8_t* panel_scales(const Weight& w, int panel) {
  return w.scales + (size_t)panel * w.n_groups * kPanel * scale_size(w.scale_type);
}
LB_INLINE const uint8_t* panel_zeros(const Weight& w, int panel) {
  return w.zeros ? w.zeros + (size_t)panel * w.n_groups * kPanel : nullptr;
}
LB_INLINE I16 load_zero(const uint8_t* p) { return widen_u8(p); }

// The product of (code - zero) with a is the product of code with a, minus zero * sum(a): start the sum there.
// Act.sum holds minus the sum, and the zero of symmetric weights is a power of two: a broadcast and a shift.
LB_INLINE I16 start_sum(int shift, int32_t minus_sum) { return splat_i(minus_sum) << shift; }
LB_INLINE I16 start_sum(I16 zero, int32_t minus_sum) { return zero * minus_sum; }

LB_INLINE F16 fold_in(F16 part, I16 sum, float act_scale) { return fma(to_float(sum), splat(act_scale), part); }

// Lanes past the last row are dropped; the bias joins after the last fold.
LB_INLINE void finish(const Weight& w, int panel, F16 v, float* out, bool add) {
  int row = panel * kPanel, n = w.rows - row;
  if (n >= kPanel) {
    if (w.bias) v += load<F16>(w.bias + row);
    if (add) v += load<F16>(out);
    store(out, v);
  } else {
    for (int i = 0; i < n; ++i) {
      float x = v[i] + (w.bias ? w.bias[row + i] : 0.f);
      out[i] = add ? out[i] + x : x;
    }
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
