// Everything between the products: norm + quantization in one pass over a row, gated activations, rotary positions,
// the Hadamard rotation.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace lowbit {
namespace LOWBIT_ISA {

LB_INLINE F16 load_some(const float* p, int n) {  // n < 16: zeros behind
  F16 v = {};
  std::memcpy(&v, p, (size_t)n * 4);
  return v;
}
LB_INLINE F16 load_to(const float* p, int i, int n) { return n - i >= 16 ? load<F16>(p + i) : load_some(p + i, n - i); }
LB_INLINE F16 vabs(F16 v) { return bits<F16>(bits<U16>(v) & 0x7fffffffu); }

// A NaN, which was converted to the lowest integer, becomes -127.
LB_INLINE I16 within_127(I16 c) {
  c = select(c > 127, splat_i(127), c);
  return select(c < -127, splat_i(-127), c);
}

// q = round(y * 127 / max|y|), scale = max|y| / 127. A group whose maximum is below 1e-30 is stored as zeros: the
// reciprocal would not be finite. Returns the scale.
LB_INLINE float reciprocal_scale(float top, float* scale) {
  if (!(top >= 1e-30f)) {
    *scale = 0.f;
    return 0.f;
  }
  *scale = top * (1.f / 127.f);
  return 127.f / top;
}

// x (n floats) -> y = x / rms(x) * weight, then codes / bf16 / float as asked for. Columns n .. stride are zeros.
void norm_quant(const float* x, const float* weight, float eps, int n, int stride, int fold, int group, int8_t* q,
                float* scale, int32_t* sum, uint16_t* bf16, float* y) {
  float inv = 1.f;
  if (weight) {
    F16 s0 = {}, s1 = {};
    int i = 0;
    for (; i + 32 <= n; i += 32) {
      F16 a = load<F16>(x + i), b = load<F16>(x + i + 16);
      s0 = fma(a, a, s0);
      s1 = fma(b, b, s1);
    }
    for (; i < n; i += 16) {
      F16 a = load_to(x, i, n);
      s0 = fma(a, a, s0);
    }
    inv = 1.f / __builtin_sqrtf(reduce_add(s0 + s1) / (float)n + eps);
  }
  auto value = [&](int i) -> F16 {
    F16 v = load_to(x, i, n);
    return weight ? v * inv * load_to(weight, i, n) : v;
  };
  if (y)
    for (int i = 0; i < n; i += 16) {
      F16 v = value(i);
      std::memcpy(y + i, &v, (size_t)(n - i < 16 ? n - i : 16) * 4);
    }
  if (bf16)
    for (int i = 0; i < stride; i += 16) store(bf16 + i, i < n ? to_bf16(value(i)) : H16{});
  if (!q) return;
  const bool whole = group >= n;
  float shared = 0.f, shared_mul = 0.f;
  if (whole) {
    F16 top = {};
    for (int i = 0; i < n; i += 16) top = vmax(top, vabs(value(i)));
    shared_mul = reciprocal_scale(reduce_max(top), &shared);
  }
  float group_scale = 0.f, group_mul = 0.f;
  for (int k = 0, f = 0; k < stride; k += fold, ++f) {
    if (whole) {
      group_scale = shared;
      group_mul = shared_mul;
    } else if (k % group == 0) {
      F16 top = {};
      for (int i = k; i < k + group && i < n; i += 16) top = vmax(top, vabs(value(i)));
      group_mul = reciprocal_scale(reduce_max(top), &group_scale);
    }
    I16 total = {};
    for (int i = k; i < k + fold; i += 16) {
      I16 c = i < n ? to_int(value(i) * group_mul) : I16{};
      c = within_127(c);
      total += c;
      store_s8(q + i, c);
    }
    scale[f] = group_scale;
    sum[f] = -reduce_add_i(total);
  }
}

LB_INLINE F16 sigmoid(F16 x) { return 1.f / (1.f + vexp(-x)); }

// h = act(gate) * up, n values.
void glu(const float* gate, const float* up, float* h, int n, int act) {
  for (int i = 0; i < n; i += 16) {
    F16 g = load_to(gate, i, n), u = load_to(up, i, n), a;
    if (act == 0) {
      a = g * sigmoid(g);
    } else {  // gelu, tanh form: g * sigmoid(2 * 0.79788456 * (g + 0.044715 g^3))
      a = g * sigmoid(1.5957691216f * (g + 0.044715f * g * g * g));
    }
    F16 r = a * u;
    std::memcpy(h + i, &r, (size_t)(n - i < 16 ? n - i : 16) * 4);
  }
}

// Rotate the first `rot` of `dim` values of a head; pairs are (i, i + rot / 2); cos and sin have rot / 2 entries.
void rope(float* x, int dim, int rot, const float* cos, const float* sin) {
  (void)dim;
  const int half = rot / 2;
  int i = 0;
  for (; i + 16 <= half; i += 16) {
    F16 a = load<F16>(x + i), b = load<F16>(x + half + i), c = load<F16>(cos + i), s = load<F16>(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

// Fast Walsh-Hadamard transform of the largest power of two dividing n, block by block, times `scale`.
void hadamard(float* x, int n, float scale) {
  const int block = n & -n;
  for (float* p = x; p < x + n; p += block) {
    for (int h = 1; h < block; h *= 2) {
      if (h >= 16) {
        for (int i = 0; i < block; i += 2 * h)
          for (int j = i; j < i + h; j += 16) {
            F16 a = load<F16>(p + j), b = load<F16>(p + j + h);
            store(p + j, a + b);
            store(p + j + h, a - b);
          }
      } else {
        for (int i = 0; i < block; i += 2 * h)
          for (int j = i; j < i + h; ++j) {
            float a = p[j], b = p[j + h];
            p[j] = a + b;
            p[j + h] = a - b;
          }
      }
    }
    for (int i = 0; i < block; ++i) p[i] *= scale;
  }
}

void rows_to_float(const void* src, int type, float* dst, int n, float scale) {
  int i = 0;
  if (type == 3) {
    const uint8_t* codes = (const uint8_t*)src;
    for (; i < n; ++i) dst[i] = (float)((int)codes[i] - 128) * scale;
    return;
  }
  for (; i + 16 <= n; i += 16) {
    F16 v = type == 0 ? load<F16>((const float*)src + i)
            : type == 1 ? load_bf16((const uint16_t*)src + i) : load_half((const uint16_t*)src + i);
    store(dst + i, v * scale);
  }
  if (i < n) {
    uint16_t h[16] = {};
    float f[16] = {};
    if (type == 0) std::memcpy(f, (const float*)src + i, (size_t)(n - i) * 4);
    else std::memcpy(h, (const uint16_t*)src + i, (size_t)(n - i) * 2);
    F16 v = (type == 0 ? load<F16>(f) : type == 1 ? load_bf16(h) : load_half(h)) * scale;
    std::memcpy(dst + i, &v, (size_t)(n - i) * 4);
  }
}

int32_t argmax(const float* x, int n) {  // first of equals, as torch
  int32_t best = 0;
  float top = x[0];
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    float m = reduce_max(load<F16>(x + i));
    if (m > top)
      for (int j = i; j < i + 16; ++j)
        if (x[j] > top) {
          top = x[j];
          best = j;
        }
  }
  for (; i < n; ++i)
    if (x[i] > top) {
      top = x[i];
      best = i;
    }
  return best;
}

void softcap(float* x, int n, float cap) {
  for (int i = 0; i < n; i += 16) {
    F16 v = load_to(x, i, n);
    F16 t = cap * (2.f * sigmoid(v * (2.f / cap)) - 1.f);
    std::memcpy(x + i, &t, (size_t)(n - i < 16 ? n - i : 16) * 4);
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
