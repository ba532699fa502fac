// Sixteen lanes, whatever the machine.
//
// Every kernel is written once over GCC/Clang vector extensions of 64 bytes: F16 (16 floats), I16 (16 int32),
// B64 (64 bytes). With AVX2 they are two vectors of 32 (wide.h); where registers have 16 bytes the compiler splits them.
// Only the few operations that the extensions cannot express (the 4-way byte dot product, half floats, a table lookup, a
// rounding conversion) are written per instruction set below.
//
// This header is compiled several times with different flags, so everything lives in the namespace LOWBIT_ISA and
// nothing here may call an inline function of the standard library: the linker could keep the AVX-512 copy of it
// for the whole program and crash on a smaller machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "wide.h"

namespace lowbit {
namespace LOWBIT_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)
#define LB_HALVES  // a vector is two registers
#define LB_TWO(name, element)                                \
  typedef element name##Half __attribute__((vector_size(32))); \
  typedef Two<name##Half, element> name
LB_TWO(F16, float);
LB_TWO(I16, int32_t);
LB_TWO(U16, uint32_t);
LB_TWO(B64, uint8_t);
LB_TWO(H32, uint16_t);
#undef LB_TWO
#else
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint8_t B64 __attribute__((vector_size(64)));
typedef uint16_t H32 __attribute__((vector_size(64)));
#endif
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef uint8_t B16 __attribute__((vector_size(16)));
typedef int8_t S16 __attribute__((vector_size(16)));

// How many rows of activations one pass keeps in registers; see linear.h.
#if defined(__AVX512F__)
constexpr int kGemvRows = 8, kTileRows = 6, kTilePanels = 2;
#else
constexpr int kGemvRows = 4, kTileRows = 4, kTilePanels = 1;
#endif

// Whether dot4 takes any byte as the weight at no extra cost.
#if defined(__AVX512VNNI__)
constexpr bool kWideDot = true;
#else
constexpr bool kWideDot = false;
#endif

// Not F16{} + x: 0 + x is an addition (it turns -0 into 0), and it hides the broadcast from the compiler.
#if defined(LB_HALVES)
LB_INLINE F16 splat(float x) { return {(F16Half)_mm256_set1_ps(x), (F16Half)_mm256_set1_ps(x)}; }
LB_INLINE I16 splat_i(int32_t x) { return {(I16Half)_mm256_set1_epi32(x), (I16Half)_mm256_set1_epi32(x)}; }
LB_INLINE F16 to_float(I16 v) {
  return {(F16Half)_mm256_cvtepi32_ps((__m256i)v.low), (F16Half)_mm256_cvtepi32_ps((__m256i)v.high)};
}
#else
LB_INLINE F16 splat(float x) { return F16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
LB_INLINE I16 splat_i(int32_t x) { return I16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
LB_INLINE F16 to_float(I16 v) { return __builtin_convertvector(v, F16); }
#endif
LB_INLINE void prefetch_write(const void* p) { __builtin_prefetch(p, 1, 3); }
LB_INLINE B64 splat_b(uint8_t x) { return B64{} + x; }
LB_INLINE int32_t load_i32(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

#if defined(__AVX512F__)
LB_INLINE F16 fma(F16 a, F16 b, F16 c) { return (F16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
LB_INLINE I16 to_int(F16 v) { return (I16)_mm512_cvtps_epi32((__m512)v); }
LB_INLINE F16 vmax(F16 a, F16 b) { return (F16)_mm512_max_ps((__m512)a, (__m512)b); }
LB_INLINE F16 vmin(F16 a, F16 b) { return (F16)_mm512_min_ps((__m512)a, (__m512)b); }
LB_INLINE float reduce_max(F16 v) { return _mm512_reduce_max_ps((__m512)v); }
LB_INLINE float reduce_add(F16 v) { return _mm512_reduce_add_ps((__m512)v); }
LB_INLINE int32_t reduce_add_i(I16 v) { return _mm512_reduce_add_epi32((__m512i)v); }
#else
LB_INLINE float reduce_max(F16 lanes) {
  float v[16];
  store(v, lanes);
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
// The same tree on every narrower machine.
LB_INLINE float reduce_add(F16 lanes) {
  float v[16];
  store(v, lanes);
  for (int h = 8; h >= 1; h /= 2)
    for (int i = 0; i < h; ++i) v[i] += v[i + h];
  return v[0];
}
LB_INLINE int32_t reduce_add_i(I16 lanes) {
  int32_t v[16], s = 0;
  store(v, lanes);
  for (int i = 0; i < 16; ++i) s += v[i];
  return s;
}
#if defined(__AVX2__)
LB_INLINE F16 vmax(F16 a, F16 b) {
  return {(F16Half)_mm256_max_ps((__m256)a.low, (__m256)b.low), (F16Half)_mm256_max_ps((__m256)a.high, (__m256)b.high)};
}
LB_INLINE F16 vmin(F16 a, F16 b) {
  return {(F16Half)_mm256_min_ps((__m256)a.low, (__m256)b.low), (F16Half)_mm256_min_ps((__m256)a.high, (__m256)b.high)};
}
LB_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return {(F16Half)_mm256_fmadd_ps((__m256)a.low, (__m256)b.low, (__m256)c.low),
          (F16Half)_mm256_fmadd_ps((__m256)a.high, (__m256)b.high, (__m256)c.high)};
}
LB_INLINE I16 to_int(F16 v) {
  return {(I16Half)_mm256_cvtps_epi32((__m256)v.low), (I16Half)_mm256_cvtps_epi32((__m256)v.high)};
}
#else
LB_INLINE F16 vmax(F16 a, F16 b) { return a > b ? a : b; }
LB_INLINE F16 vmin(F16 a, F16 b) { return a < b ? a : b; }
#if defined(__ARM_NEON)
LB_INLINE F16 fma(F16 a, F16 b, F16 c) {
  float32x4_t x[4], y[4], z[4];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  std::memcpy(z, &c, 64);
  for (int i = 0; i < 4; ++i) z[i] = vfmaq_f32(z[i], x[i], y[i]);
  return load<F16>(z);
}
LB_INLINE I16 to_int(F16 a) {
  float32x4_t x[4];
  int32x4_t r[4];
  std::memcpy(x, &a, 64);
  for (int i = 0; i < 4; ++i) r[i] = vcvtnq_s32_f32(x[i]);
  return load<I16>(r);
}
#else
LB_INLINE F16 fma(F16 a, F16 b, F16 c) { return a * b + c; }
// Adding and taking away 1.5 * 2^23 rounds half to even for |v| < 2^22; callers clamp to bytes.
LB_INLINE I16 to_int(F16 v) {
  v = vmin(vmax(v, splat(-4194303.f)), splat(4194303.f));
  F16 t = v + 12582912.f;
  return bits<I16>(t) - splat_i(0x4B400000);
}
#endif
#endif
#endif

// acc[lane] += sum over i < 4 of w[4 lane + i] (unsigned) * a[4 lane + i] (signed).
// SMALL promises w <= 127, which spares the narrower machines a detour around saturation.
#if defined(LB_HALVES)
template <bool SMALL>
LB_INLINE I16Half dot4(I16Half acc, B64Half w, I16Half a) {
  const __m256i x = (__m256i)w, y = (__m256i)a;
  if (SMALL) return acc + (I16Half)_mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1));
  const __m256i even = _mm256_and_si256(x, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(x, 8);
  const __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8), a_odd = _mm256_srai_epi16(y, 8);
  return acc + ((I16Half)_mm256_madd_epi16(even, a_even) + (I16Half)_mm256_madd_epi16(odd, a_odd));
}
#endif
template <bool SMALL>
LB_INLINE I16 dot4(I16 acc, B64 w, I16 a) {
#if defined(__AVX512VNNI__)
  return (I16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a);
#elif defined(__AVX2__)
  return {dot4<SMALL>(acc.low, w.low, a.low), dot4<SMALL>(acc.high, w.high, a.high)};
#elif defined(__ARM_FEATURE_DOTPROD)
  uint8x16_t x[4];
  int8x16_t y[4];
  int32x4_t z[4];
  std::memcpy(x, &w, 64);
  std::memcpy(y, &a, 64);
  std::memcpy(z, &acc, 64);
  for (int i = 0; i < 4; ++i) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    z[i] = vusdotq_s32(z[i], x[i], y[i]);
#else
    if (SMALL) {
      z[i] = vdotq_s32(z[i], vreinterpretq_s8_u8(x[i]), y[i]);
    } else {  // w = (w - 128) + 128, and 128 = 64 + 64
      z[i] = vdotq_s32(z[i], vreinterpretq_s8_u8(veorq_u8(x[i], vdupq_n_u8(128))), y[i]);
      z[i] = vdotq_s32(z[i], vdupq_n_s8(64), y[i]);
      z[i] = vdotq_s32(z[i], vdupq_n_s8(64), y[i]);
    }
#endif
  }
  return load<I16>(z);
#else
  U16 uw = bits<U16>(w);
  I16 r = acc;
  for (int i = 0; i < 4; ++i) {
    I16 wi = bits<I16>((uw >> (8 * i)) & 0xffu);
    I16 ai = bits<I16>(bits<U16>(a) << (24 - 8 * i)) >> 24;
    r += wi * ai;
  }
  return r;
#endif
}

// Between lanes of 32 bits and smaller ones. __builtin_convertvector says the same, but GCC does it byte by byte.
LB_INLINE I16 widen_s8(const void* p) {
#if defined(__AVX512F__)
  return (I16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return {(I16Half)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          (I16Half)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)p + 8)))};
#else
  return __builtin_convertvector(load<S16>(p), I16);
#endif
}
LB_INLINE I16 widen_u8(const void* p) {
#if defined(__AVX512F__)
  return (I16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return {(I16Half)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          (I16Half)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)p + 8)))};
#else
  return widen_s8(p) & 0xff;
#endif
}
#if defined(LB_HALVES)
// The low 16 bits of 16 lanes. Packing works within 128 bits and saturates: hence the mask, and the order after it.
LB_INLINE __m256i low_words(I16 v) {
  const __m256i mask = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256((__m256i)v.low, mask), _mm256_and_si256((__m256i)v.high, mask));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
#endif
LB_INLINE B16 low_bytes(I16 v) {
#if defined(__AVX512F__)
  return (B16)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
  const __m256i words = _mm256_and_si256(low_words(v), _mm256_set1_epi16(0xff));
  return (B16)_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
  return __builtin_convertvector(v, B16);
#endif
}
LB_INLINE void store_s8(void* p, I16 v) { store(p, low_bytes(v)); }  // values in [-128, 255]
LB_INLINE U16 widen_u16(H16 h) {
#if defined(__AVX512F__)
  return (U16)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return {(U16Half)_mm256_cvtepu16_epi32(_mm256_castsi256_si128((__m256i)h)),
          (U16Half)_mm256_cvtepu16_epi32(_mm256_extracti128_si256((__m256i)h, 1))};
#else
  return __builtin_convertvector(h, U16);
#endif
}
LB_INLINE H16 narrow_u16(U16 v) {
#if defined(__AVX512F__)
  return (H16)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  return (H16)low_words(bits<I16>(v));
#else
  return __builtin_convertvector(v, H16);
#endif
}

// 16 lookups in a 16-byte table per 128-bit lane: out[i] = table[i / 16][idx[i]], idx < 16.
LB_INLINE B64 lookup16(B64 table, B64 idx) {
#if defined(__AVX512BW__)
  return (B64)_mm512_shuffle_epi8((__m512i)table, (__m512i)idx);
#elif defined(__AVX2__)
  return {(B64Half)_mm256_shuffle_epi8((__m256i)table.low, (__m256i)idx.low),
          (B64Half)_mm256_shuffle_epi8((__m256i)table.high, (__m256i)idx.high)};
#elif defined(__ARM_NEON)
  uint8x16_t t[4], x[4];
  std::memcpy(t, &table, 64);
  std::memcpy(x, &idx, 64);
  for (int i = 0; i < 4; ++i) x[i] = vqtbl1q_u8(t[i], x[i]);
  return load<B64>(x);
#else
  B64 r;
  for (int i = 0; i < 64; ++i) r[i] = table[(i & ~15) | (idx[i] & 15)];
  return r;
#endif
}

// ---- bf16 and fp16 ----
LB_INLINE F16 load_bf16(const void* p) {
  return bits<F16>(widen_u16(load<H16>(p)) << 16);
}
LB_INLINE H16 to_bf16(F16 v) {  // round half to even; a NaN stays a NaN
  U16 u = bits<U16>(v);
  U16 r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return narrow_u16(select((u & 0x7fffffffu) > 0x7f800000u, U16{} + 0x7fc0u, r));
}
LB_INLINE F16 half_to_float(H16 h) {
#if defined(__AVX512F__)
  return (F16)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return {(F16Half)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)h)),
          (F16Half)_mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)h, 1))};
#else
  // Shift into a float's place, multiply by 2^112: right for zeros, subnormals and normals; then mend inf and NaN.
  U16 u = __builtin_convertvector(h, U16);
  U16 magnitude = (u & 0x7fffu) << 13;
  F16 f = bits<F16>(magnitude) * 5.192296858534828e33f;
  U16 r = bits<U16>(f);
  r = select((u & 0x7c00u) == 0x7c00u, magnitude | 0x7f800000u, r);
  return bits<F16>(r | ((u & 0x8000u) << 16));
#endif
}
LB_INLINE F16 load_half(const void* p) { return half_to_float(load<H16>(p)); }
LB_INLINE H16 to_half(F16 v) {
#if defined(__AVX512F__)
  return (H16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (H16)_mm256_set_m128i(_mm256_cvtps_ph((__m256)v.high, _MM_FROUND_TO_NEAREST_INT),
                               _mm256_cvtps_ph((__m256)v.low, _MM_FROUND_TO_NEAREST_INT));
#else
  H16 out;
  for (int i = 0; i < 16; ++i) {
    uint32_t u;
    float f = v[i];
    std::memcpy(&u, &f, 4);
    uint32_t sign = (u >> 16) & 0x8000u, m = u & 0x7fffffffu, r;
    if (m > 0x7f800000u) {
      r = 0x7e00u;
    } else if (m >= 0x477ff000u) {
      r = 0x7c00u;
    } else if (m < 0x38800000u) {  // subnormal: let the float adder round
      float t;
      std::memcpy(&t, &m, 4);
      t += 0.5f;
      std::memcpy(&r, &t, 4);
      r -= 0x3f000000u;
    } else {
      r = (m - 0x38000000u + 0xfffu + ((m >> 13) & 1u)) >> 13;
    }
    out[i] = (uint16_t)(sign | r);
  }
  return out;
#endif
}
// acc[lane] += w[2 lane] * a[2 lane] + w[2 lane + 1] * a[2 lane + 1] over bf16 pairs.
LB_INLINE F16 dot2_bf16(F16 acc, I16 w, I16 a) {
#if defined(__AVX512BF16__)
  return (F16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)a);
#else
  U16 uw = bits<U16>(w), ua = bits<U16>(a);
  acc = fma(bits<F16>(uw << 16), bits<F16>(ua << 16), acc);
  return fma(bits<F16>(uw & 0xffff0000u), bits<F16>(ua & 0xffff0000u), acc);
#endif
}

// e^x to about 1 ulp of 2^-22; inputs below -87 give 0 (a masked score of -inf too), above 88 saturate.
LB_INLINE F16 vexp(F16 x) {
  F16 dead = x;
  x = vmin(vmax(x, splat(-87.f)), splat(88.f));
  F16 n = x * 1.44269504f;
  F16 shifted = n + 12582912.f;
  I16 e = bits<I16>(shifted) - splat_i(0x4B400000);
  n = shifted - 12582912.f;
  F16 r = fma(n, splat(-0.693145752f), x);
  r = fma(n, splat(-1.42860677e-6f), r);
  F16 p = splat(1.9875691e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.f);
  F16 scale = bits<F16>((e + splat_i(127)) << 23);
  F16 y = p * scale;
  return select(dead < splat(-87.f), F16{}, y);
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
