// Codebooks of 8-vectors (lattice.py): E8P, 16 bits for 8 weights, and the 256 short vectors of its 3-bit form.
//
// A block of 16 rows x 32 columns has 64 codes (row, octet), at position 16 (row % 8 / 2) + 4 octet + 2 (row % 2) +
// row / 8. Its first 64 bytes are indices of absolute vectors, one of 256; E8P's second 64 are signs. The sign of entry
// 7 follows from the others, so its place says (xor that sign) whether the vector is shifted by -1/4 instead of +1/4.
//
// In quarters a weight is s m + x, m of {2, 6, 10}, s and x of {-1, 1}: odd, from -11 to 11, and so 2 u - 11 with u in 4
// bits. A gather per code would cost more than the products. Instead (AVX-512 with VBMI and GFNI) a block stays in bit
// planes, a byte being one bit of 8 weights: two 256-byte tables, looked up 64 bytes at a time, say which entries are 6
// and which are 10; parity is an 8x8 bit matrix product; three logical operations on planes give the bits of u for 512
// weights; and a matrix product with powers of two turns 4 planes of two codes into 8 bytes of two nibbles each. Then
// as with 4 bits, 8 rows in the low nibbles and 8 in the high ones, a row in two lanes. About 45 instructions a block.
//
// Other machines take codes from the table of vectors one by one, into the 8-bit layout (value + 16).
//
// Weight.table: 256 x 8 bytes, E8P 4 |v|, short vectors 2 v + 8; then planes of 256 bytes, E8P: entries 6, entries 10;
// short vectors: the 4 bits of 2 v + 8, highest first.
#pragma once

#include "stream.h"

namespace lowbit {
namespace LOWBIT_ISA {

constexpr uint64_t kOnes = 0x0101010101010101u;

LB_INLINE uint64_t load_u64(const void* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}

// Bit i of `byte` as byte i, 0 or 255.
LB_INLINE uint64_t bits_to_bytes(uint8_t byte) {
  const uint64_t t = (byte * kOnes) & 0x8040201008040201u;
  return (((t + 0x7f * kOnes) >> 7) & kOnes) * 255;
}

void lattice_spread(const Weight& w, int panel, int block, uint8_t* dst) {
  const uint8_t* p = w.codes + ((size_t)panel * w.blocks + block) * 64 * w.bits;
  for (int r = 0; r < kPanel; ++r)
    for (int o = 0; o < 4; ++o) {
      const int at = 16 * (r % 8 / 2) + 4 * o + 2 * (r % 2) + r / 8;
      const uint64_t entry = load_u64(w.table + 8 * p[at]);
      uint64_t value;
      if (w.bits == 1) {
        value = entry + 8 * kOnes;
      } else {
        uint8_t sign = p[64 + at];
        const int shift = __builtin_parity(sign ^ w.table[2048 + p[at]]);
        sign ^= (uint8_t)(shift << 7);
        const uint64_t negative = bits_to_bytes(sign);
        value = (shift ? 15 : 17) * kOnes + (entry & ~negative) - (entry & negative);  // bytes stay in 5 .. 27
      }
      std::memcpy(dst + 2 * o * 64 + 4 * r, &value, 4);
      std::memcpy(dst + (2 * o + 1) * 64 + 4 * r, (const char*)&value + 4, 4);
    }
}

#if defined(__AVX512VNNI__) && defined(__GNUC__)
#define LB_BITS __attribute__((target("avx512vbmi,gfni")))
#define LB_BITS_INLINE static inline __attribute__((always_inline, target("avx512vbmi,gfni")))

LB_BITS_INLINE __m512i lookup256(const uint8_t* t, __m512i index) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(t), index, _mm512_loadu_si512(t + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(t + 128), index, _mm512_loadu_si512(t + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
}

// Planes of u, highest bit first.
LB_BITS_INLINE void planes_e8p(const uint8_t* p, const uint8_t* t, __m512i u[4]) {
  const __m512i index = _mm512_loadu_si512(p), stored = _mm512_loadu_si512(p + 64);
  const __m512i six = lookup256(t, index), ten = lookup256(t + 256, index);
  // Every bit of u[3]: not the parity of signs and sixes, which is 1 for the shift of -1/4.
  u[3] = _mm512_gf2p8affine_epi64_epi8(_mm512_xor_si512(stored, six), _mm512_set1_epi8(-1), 0xff);
  const __m512i sign = _mm512_ternarylogic_epi64(stored, u[3], _mm512_set1_epi8(-128), 0xd2);  // a ^ (~b & c)
  u[0] = _mm512_ternarylogic_epi64(sign, six, ten, 0x0e);                                     // ~a & (b | c)
  u[1] = _mm512_ternarylogic_epi64(six, ten, ten, 0x03);                                      // ~(a | b)
  u[2] = _mm512_ternarylogic_epi64(sign, six, six, 0xc3);                                     // ~(a ^ b)
}
LB_BITS_INLINE void planes_short(const uint8_t* p, const uint8_t* t, __m512i u[4]) {
  const __m512i index = _mm512_loadu_si512(p);
  for (int i = 0; i < 4; ++i) u[i] = lookup256(t + 256 * i, index);
}

template <int BITS, int M>
LB_BITS_INLINE void lattice_block(const uint8_t* p, const uint8_t* t, const int8_t* q, size_t stride, __m512i (*s)[2]) {
  __m512i u[4];
  BITS == 2 ? planes_e8p(p, t, u) : planes_short(p, t, u);
  const __m512i a = _mm512_unpacklo_epi8(u[0], u[1]), b = _mm512_unpackhi_epi8(u[0], u[1]);
  const __m512i c = _mm512_unpacklo_epi8(u[2], u[3]), d = _mm512_unpackhi_epi8(u[2], u[3]);
  const __m512i octet[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c), _mm512_unpacklo_epi16(b, d),
                            _mm512_unpackhi_epi16(b, d)};
  for (int o = 0; o < 4; ++o) {
    const __m512i v = _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64((long long)0x8040201008040201u), octet[o], 0);
    const __m512i high = _mm512_and_si512(v, _mm512_set1_epi8(-16)), low = _mm512_and_si512(v, _mm512_set1_epi8(15));
    for (int m = 0; m < M; ++m) {
      const __m512i x = _mm512_set1_epi64((long long)load_u64(q + m * stride + 8 * o));
      s[m][0] = _mm512_dpbusd_epi32(s[m][0], high, x);
      s[m][1] = _mm512_dpbusd_epi32(s[m][1], low, x);
    }
  }
}

// Two lanes a row: rows 0..7 sixteen times too large, then rows 8..15.
LB_INLINE I16 sum_rows(__m512i high, __m512i low) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  high = _mm512_srai_epi32(high, 4);
  return (I16)_mm512_add_epi32(_mm512_permutex2var_epi32(high, even, low), _mm512_permutex2var_epi32(high, odd, low));
}

// The walk of stream_panel, written out: an instruction set of one function cannot be handed to a template's argument.
template <int BITS, int M>
LB_BITS void lattice_panels(const Weight& w, const Act& a, int p0, int p1, float* out, size_t ldo, bool add) {
  const int segments = w.blocks * kBlock / w.segment, folds = w.segment / w.fold, per_fold = w.fold / kBlock;
  const int per_group = w.group >= w.cols ? segments : w.group / w.segment, act_folds = a.stride / a.fold;
  const uint8_t* planes = w.table + 2048;
  for (int panel = p0; panel < p1; ++panel) {
    const uint8_t *p = w.codes + (size_t)panel * w.blocks * 64 * BITS, *ps = panel_scales(w, panel);
    const int8_t* q = a.q;
    F16 total[M] = {}, ws = {};
    for (int g = 0, f = 0; g < segments; ++g) {
      if (g % per_group == 0) {
        ws = load_scale(ps, w.scale_type);
        ps += scale_size(w.scale_type) * kPanel;
      }
      F16 part[M] = {};
      for (int end = f + folds; f < end; ++f) {
        __m512i s[M][2];
        for (int m = 0; m < M; ++m) s[m][0] = s[m][1] = _mm512_setzero_si512();
        for (int b = 0; b < per_fold; ++b, p += 64 * BITS, q += kBlock) lattice_block<BITS, M>(p, planes, q, a.stride, s);
        for (int m = 0; m < M; ++m) {
          const I16 rows = sum_rows(s[m][0], s[m][1]);
          const int32_t minus = a.sum[m * act_folds + f];
          part[m] = fold_in(part[m], BITS == 2 ? rows + rows + splat_i(11 * minus) : rows + splat_i(8 * minus),
                            a.scale[m * act_folds + f]);
        }
      }
      for (int m = 0; m < M; ++m) total[m] = fma(part[m], ws, total[m]);
    }
    for (int m = 0; m < M; ++m) finish(w, panel, total[m], out + (size_t)m * ldo + panel * kPanel, add);
  }
}

bool lattice_few_rows(const Weight& w, const Act& a, int m, int p0, int p1, float* out, size_t ldo, bool add) {
  static const bool able = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
  if (!able) return false;
  if (w.bits == 2)
    m == 1 ? lattice_panels<2, 1>(w, a, p0, p1, out, ldo, add) : lattice_panels<2, 2>(w, a, p0, p1, out, ldo, add);
  else
    m == 1 ? lattice_panels<1, 1>(w, a, p0, p1, out, ldo, add) : lattice_panels<1, 2>(w, a, p0, p1, out, ldo, add);
  return true;
}
#else
bool lattice_few_rows(const Weight&, const Act&, int, int, int, float*, size_t, bool) { return false; }
#endif

}  // namespace LOWBIT_ISA
}  // namespace lowbit
