// One or two rows of activations by codes of 3 bits and fewer: here taking a block apart costs more than its products,
// so no bit is moved that need not be.
//
// A code that a mask cuts out of the middle of a byte is a power of two too large. Codes of one such place go into one
// integer sum and the *sum* is shifted, once a fold instead of once a code:
//
//   2 bits   v & 3, v & 12 and the same of v >> 4:  2 loads, 2 shifts, 8 masks for 8 dot products
//   3 bits   v & 7 and v & 56 of three vectors are six codes; the 2 bits that each byte has left are the other two:
//            (a & 192) | (c >> 1 & 32) is 32 times too large.  3 loads, 2 shifts, 12 masks and unions for 8 dot products
//
// That needs a dot product that takes any byte. AVX2's adds pairs in 16 bits and saturates; it gets codes in place
// (`spread`), and since they are small, a whole block's eight products are added in 16 bits before they are widened.
#pragma once

#include "linear.h"

namespace lowbit {
namespace LOWBIT_ISA {

#if defined(__AVX512VNNI__)
constexpr bool kStream = true;

template <int M, int SUMS>
LB_INLINE void add_places(const B64 x[8], const int place[8], const int8_t* q, size_t stride, I16 (*s)[SUMS]) {
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < 8; ++j)
      s[m][place[j]] = dot4<false>(s[m][place[j]], x[j], splat_i(load_i32(q + m * stride + 4 * j)));
}

struct Places2 {
  static constexpr int kBytes = 128, kSums = 2;
  template <int M>
  LB_INLINE void add(const uint8_t* p, const int8_t* q, size_t stride, I16 (*s)[kSums]) {
    constexpr int place[8] = {0, 1, 0, 1, 0, 1, 0, 1};
    B64 x[8];
    for (int i = 0; i < 2; ++i) {
      const H32 v = load<H32>(p + 64 * i), h = v >> 4;
      x[4 * i] = bits<B64>(v & 0x0303), x[4 * i + 1] = bits<B64>(v & 0x0c0c);
      x[4 * i + 2] = bits<B64>(h & 0x0303), x[4 * i + 3] = bits<B64>(h & 0x0c0c);
    }
    add_places<M, kSums>(x, place, q, stride, s);
  }
  LB_INLINE I16 close(const I16* s) { return s[0] + (s[1] >> 2); }
};

struct Places3 {
  static constexpr int kBytes = 192, kSums = 3;
  template <int M>
  LB_INLINE void add(const uint8_t* p, const int8_t* q, size_t stride, I16 (*s)[kSums]) {
    constexpr int place[8] = {0, 1, 0, 1, 0, 1, 2, 2};
    const H32 a = load<H32>(p), b = load<H32>(p + 64), c = load<H32>(p + 128);
    const B64 x[8] = {bits<B64>(a & 0x0707), bits<B64>(a & 0x3838), bits<B64>(b & 0x0707), bits<B64>(b & 0x3838),
                      bits<B64>(c & 0x0707), bits<B64>(c & 0x3838), bits<B64>((a & 0xc0c0) | ((c >> 1) & 0x2020)),
                      bits<B64>((b & 0xc0c0) | ((c >> 2) & 0x2020))};
    add_places<M, kSums>(x, place, q, stride, s);
  }
  LB_INLINE I16 close(const I16* s) { return s[0] + (s[1] >> 3) + (s[2] >> 5); }
};
#elif defined(__AVX2__)
constexpr bool kStream = true;

template <int BITS>
struct Small {
  static constexpr int kBytes = 64 * BITS, kSums = 1;
  template <int M>
  LB_INLINE void add(const uint8_t* p, const int8_t* q, size_t stride, I16 (*s)[kSums]) {
    B64 x[8];
    spread<BITS>(p, x);
    for (int m = 0; m < M; ++m) {
      __m256i low = _mm256_setzero_si256(), high = low;
      for (int j = 0; j < 8; ++j) {  // at most 8 x 2 x 7 x 127 = 14224
        const __m256i a = _mm256_set1_epi32(load_i32(q + m * stride + 4 * j));
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16((__m256i)x[j].low, a));
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16((__m256i)x[j].high, a));
      }
      const __m256i ones = _mm256_set1_epi16(1);
      s[m][0] += I16{(I16Half)_mm256_madd_epi16(low, ones), (I16Half)_mm256_madd_epi16(high, ones)};
    }
  }
  LB_INLINE I16 close(const I16* s) { return s[0]; }
};
typedef Small<2> Places2;
typedef Small<3> Places3;
#else
constexpr bool kStream = false;
#endif

// The walk along a panel: D adds a block to its integer sums and, at the end of a fold, makes one sum a row of them.
// Same order of float operations as everywhere (kernels.h).
template <class D, bool ASYM, int M>
LB_INLINE void stream_panel(const Weight& w, const Act& a, int row0, int panel, int factor, float* out, size_t ldo, bool add) {
  const uint8_t *p = w.codes + (size_t)panel * w.blocks * D::kBytes, *ps = panel_scales(w, panel), *pz = panel_zeros(w, panel);
  const int segments = w.blocks * kBlock / w.segment, folds = w.segment / w.fold, per_fold = w.fold / kBlock;
  const int per_group = w.group >= w.cols ? segments : w.group / w.segment, act_folds = a.stride / a.fold;
  const int8_t* q = a.q + (size_t)row0 * a.stride;
  const float* as = a.scale + (size_t)row0 * act_folds;
  const int32_t* sums = a.sum + (size_t)row0 * act_folds;
  F16 total[M] = {}, ws = {};
  I16 zero = splat_i(factor);
  for (int g = 0; g < segments; ++g) {
    if (g % per_group == 0) {
      ws = load_scale(ps, w.scale_type);
      ps += scale_size(w.scale_type) * kPanel;
      if (ASYM) {
        zero = load_zero(pz);
        pz += kPanel;
      }
    }
    F16 part[M] = {};
    for (int f = 0; f < folds; ++f, ++as, ++sums) {
      I16 s[M][D::kSums] = {};
      for (int b = 0; b < per_fold; ++b, p += D::kBytes, q += kBlock) D::template add<M>(p, q, a.stride, s);
      for (int m = 0; m < M; ++m) {
        const I16 offset = ASYM ? start_sum(zero, sums[m * act_folds]) : splat_i(factor * sums[m * act_folds]);
        part[m] = fold_in(part[m], offset + D::close(s[m]), as[m * act_folds]);
      }
    }
    for (int m = 0; m < M; ++m) total[m] = fma(part[m], ws, total[m]);
  }
  for (int m = 0; m < M; ++m) finish(w, panel, total[m], out + (size_t)(row0 + m) * ldo + panel * kPanel, add);
}

template <int M>
void stream_low(const Weight& w, const Act& a, int row0, int p0, int p1, float* out, size_t ldo, bool add) {
#if defined(__AVX2__)
  for (int panel = p0; panel < p1; ++panel) {
    if (w.bits == 2)
      w.zeros ? stream_panel<Places2, true, M>(w, a, row0, panel, 0, out, ldo, add)
              : stream_panel<Places2, false, M>(w, a, row0, panel, w.zero, out, ldo, add);
    else
      w.zeros ? stream_panel<Places3, true, M>(w, a, row0, panel, 0, out, ldo, add)
              : stream_panel<Places3, false, M>(w, a, row0, panel, w.zero, out, ldo, add);
  }
#else
  (void)w, (void)a, (void)row0, (void)p0, (void)p1, (void)out, (void)ldo, (void)add;
#endif
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
