// Codes that index a 16-entry table, one table per row (any4) or the same one everywhere (nf4).
//
// A byte shuffle looks up 16 bytes per 128-bit lane in that lane's own table, so here a lane is a *row*: vector v of a
// block holds rows 4v .. 4v+3, 16 bytes each; low nibbles are columns 0..15 of the block and high nibbles 16..31.
// Table entries are int8 (+128) in units of the row's scale: a 1/254 grid, 16 times finer than what 4 bits resolve.
// The looked-up bytes are then multiplied like 8-bit codes. For many rows the block is spread to the 8-bit layout and
// takes the common path; int32 sums are exact, so both give the same bits.
#pragma once

#include "fold.h"

namespace lowbit {
namespace LOWBIT_ISA {

LB_INLINE I16 splat_16_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (I16)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  const __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return {(I16Half)v, (I16Half)v};
#else
  I16 v;
  for (int i = 0; i < 4; ++i) std::memcpy((char*)&v + 16 * i, p, 16);
  return v;
#endif
}

// Four vectors, each with 4 partial sums for 4 rows -> one sum per row, in row order.
LB_INLINE I16 sum_quads(I16 a, I16 b, I16 c, I16 d) {
  int32_t r[16], t[4][16];
  store(t[0], a);
  store(t[1], b);
  store(t[2], c);
  store(t[3], d);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) r[4 * i + j] = t[i][4 * j] + t[i][4 * j + 1] + t[i][4 * j + 2] + t[i][4 * j + 3];
  return load<I16>(r);
}
#if defined(__AVX512F__)
LB_INLINE I16 sum_quads_512(I16 a, I16 b, I16 c, I16 d) {
  // Transposed sum inside each 128-bit lane: lane j of the result = (row j of a, of b, of c, of d).
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32((__m512i)a, (__m512i)b), _mm512_unpackhi_epi32((__m512i)a, (__m512i)b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32((__m512i)c, (__m512i)d), _mm512_unpackhi_epi32((__m512i)c, (__m512i)d));
  __m512i s = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (I16)_mm512_permutexvar_epi32(order, s);
}
#define LB_SUM_QUADS sum_quads_512
#else
#define LB_SUM_QUADS sum_quads
#endif

template <int M>
void table_gemv(const Weight& w, const Act& a, int row0, int p0, int p1, float* out, size_t ldo, bool add) {
  const int segments = w.blocks * kBlock / w.segment, folds = w.segment / w.fold, per_fold = w.fold / kBlock;
  const int per_group = w.group >= w.cols ? segments : w.group / w.segment;
  const int act_folds = a.stride / a.fold;
  const float* as = a.scale + (size_t)row0 * act_folds;
  const int32_t* sums = a.sum + (size_t)row0 * act_folds;
  const size_t ss = scale_size(w.scale_type) * kPanel;
  for (int panel = p0; panel < p1; ++panel) {
    const uint8_t* p = w.codes + (size_t)panel * w.blocks * 256;
    const uint8_t* ps = panel_scales(w, panel);
    const int8_t* q = a.q + (size_t)row0 * a.stride;
    B64 t[4];
    for (int v = 0; v < 4; ++v) t[v] = load<B64>(w.table + (size_t)panel * 256 + 64 * v);
    F16 total[M] = {}, ws = {};
    for (int g = 0, left = 0; g < segments; ++g) {
      if (left == 0) {
        ws = load_scale(ps, w.scale_type);
        ps += ss;
        left = per_group;
      }
      --left;
      F16 part[M] = {};
      for (int i = 0; i < folds; ++i) {
        const int f = g * folds + i;
        I16 acc[M][4] = {};
        for (int b = 0; b < per_fold; ++b, p += 256, q += kBlock)
          for (int v = 0; v < 4; ++v) {
            H32 c = load<H32>(p + 64 * v);
            B64 low = lookup16(t[v], bits<B64>(c & 0x0f0f)), high = lookup16(t[v], bits<B64>((c >> 4) & 0x0f0f));
            for (int m = 0; m < M; ++m) {
              acc[m][v] = dot4<false>(acc[m][v], low, splat_16_bytes(q + (size_t)m * a.stride));
              acc[m][v] = dot4<false>(acc[m][v], high, splat_16_bytes(q + (size_t)m * a.stride + 16));
            }
          }
        for (int m = 0; m < M; ++m) {
          I16 s = start_sum(7, sums[m * act_folds + f]) + LB_SUM_QUADS(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
          part[m] = fold_in(part[m], s, as[m * act_folds + f]);
        }
      }
      for (int m = 0; m < M; ++m) total[m] = fma(part[m], ws, total[m]);
    }
    for (int m = 0; m < M; ++m) finish(w, panel, total[m], out + (size_t)(row0 + m) * ldo + panel * kPanel, add);
  }
}

// To the 8-bit layout: look up, then hand out 4-byte pieces.
void table_spread(const Weight& w, int panel, int block, uint8_t* dst) {
  const uint8_t* p = w.codes + ((size_t)panel * w.blocks + block) * 256;
  const uint8_t* t = w.table + (size_t)panel * 256;
  for (int v = 0; v < 4; ++v) {
    const B64 entries = load<B64>(t + 64 * v);
    const H32 c = load<H32>(p + 64 * v);
    uint8_t found[2][64];
    store(found[0], lookup16(entries, bits<B64>(c & 0x0f0f)));
    store(found[1], lookup16(entries, bits<B64>((c >> 4) & 0x0f0f)));
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < 4; ++r)
        for (int k = 0; k < 4; ++k)
          std::memcpy(dst + (half * 4 + k) * 64 + (4 * v + r) * 4, found[half] + 16 * r + 4 * k, 4);
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
