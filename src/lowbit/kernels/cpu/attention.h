// Attention over a paged cache, streaming: scores of 64 tokens at a time, a running maximum and sum per query row
// (the "online softmax"), so neither the prompt's nor the cache's length needs memory.
//
// A query row is one (token, head); all heads that share a kv head, and in prefill several tokens, share one read of
// the cache. Chunks start at absolute multiples of 64 and rows never mix: the result for a token does not depend on
// which tokens were computed beside it, so a cached prefix gives the same bits as an uncached one.
//
// Cached tiles are widened to float in a buffer that stays in the first cache. One-token decoding over int8 keys skips
// that: the query is split into two int8 digits (q ~ a 15-bit integer), and scores are byte dot products.
#pragma once

#include "elementwise.h"

namespace lowbit {
namespace LOWBIT_ISA {

constexpr int kTile = 16, kChunk = 64, kRowBlock = 32;

LB_INLINE F16 fp8_to_float(const uint8_t* p) {  // e4m3: shifted into a half, which is 2^8 too small
  H16 u = narrow_u16(bits<U16>(widen_u8(p)));
  return half_to_float(((u & 0x7f) << 7) | ((u & 0x80) << 8)) * 256.f;
}
LB_INLINE B16 float_to_fp8(F16 v) {  // saturating at 448, half to even; NaN becomes 448
  F16 a = vmin(vabs(v), splat(448.f));
  U16 u = bits<U16>(a);
  U16 normal = (u + 0x7ffffu + ((u >> 20) & 1u) - 0x3c000000u) >> 20;
  U16 tiny = bits<U16>(a + 16384.f) - 0x46800000u;  // steps of 2^-9: the adder rounds
  U16 r = select(a < splat(0.015625f), tiny, normal);
  return low_bytes(bits<I16>(r | ((bits<U16>(v) >> 24) & 0x80u)));
}

LB_INLINE uint8_t* tile_at(const Kv& kv, const int32_t* table, int head, int pos) {
  const int tiles = kv.block / kTile;
  return kv.base + (size_t)table[pos / kv.block] * kv.block_bytes +
         ((size_t)head * tiles + (pos % kv.block) / kTile) * kv.tile_bytes;
}
LB_INLINE size_t half_tile(const Kv& kv) {
  const size_t values = (size_t)kTile * kv.dim;
  return kv.type == KvType::kInt4 ? values / 2 : values * (kv.type <= KvType::kBf16 ? 2 : 1);
}
// The 16 scales of an int4 group, its 16 lows behind them. part: 0 keys, 1 values.
LB_INLINE const uint16_t* int4_side(const Kv& kv, const uint8_t* tile, int part, int group) {
  const int groups = (kv.dim + kKvGroup - 1) / kKvGroup;
  return (const uint16_t*)(tile + 2 * half_tile(kv)) + (size_t)(part * groups + group) * 2 * kTile;
}


LB_INLINE uint16_t half_of(float x) { return to_half(splat(x))[0]; }

// One token's group of n dims (a multiple of 16) -> codes 0 .. 15, a byte each.
LB_INLINE void int4_group(const float* x, int n, bool fixed, uint8_t* codes, uint16_t* scale, uint16_t* low) {
  F16 top = load<F16>(x), bottom = top;
  for (int i = 16; i < n; i += 16) top = vmax(top, load<F16>(x + i)), bottom = vmin(bottom, load<F16>(x + i));
  const float least = fixed ? -8.f : -reduce_max(vmin(splat(0.f) - bottom, splat(65504.f)));
  *low = half_of(least > 65504.f ? 65504.f : least);
  const float from = half_to_float(H16{} + *low)[0];
  const float step = fixed ? 1.f : (reduce_max(top) - from) * (1.f / 15.f);
  *scale = half_of(step > 65504.f ? 65504.f : step);
  const float kept = half_to_float(H16{} + *scale)[0], mul = kept > 0.f ? 1.f / kept : 0.f;
  for (int i = 0; i < n; i += 16) {
    I16 c = to_int(vmin(vmax((load<F16>(x + i) - from) * mul, splat(0.f)), splat(15.f)));
    store_s8(codes + i, c);
  }
}

LB_INLINE void store_int4(const Kv& kv, const float* x, uint8_t* tile, int part, int t) {
  const int d = kv.dim;
  uint8_t* half = tile + (part ? half_tile(kv) : 0);
  for (int at = 0; at < d; at += kKvGroup) {
    const int n = d - at < kKvGroup ? d - at : kKvGroup;
    uint8_t c[kKvGroup];
    uint16_t* side = (uint16_t*)int4_side(kv, tile, part, at / kKvGroup);
    int4_group(x + at, n, kv.fixed, c, side + t, side + kTile + t);
    for (int i = 0; i < n; ++i) {
      const int dim = at + i;
      if (!part && dim % 8 < 4) half[(size_t)(dim / 8) * 64 + t * 4 + dim % 4] = (uint8_t)(c[i] | c[i + 4] << 4);
      if (part && dim % 16 < 8) half[(size_t)t * d / 2 + dim / 16 * 8 + dim % 8] = (uint8_t)(c[i] | c[i + 8] << 4);
    }
  }
}

// Write one token's key and value of one head.
void kv_store(const Kv& kv, const float* k, const float* v, int head, int block, int slot) {
  const int tiles = kv.block / kTile, d = kv.dim, t = slot % kTile;
  uint8_t* tile = kv.base + (size_t)block * kv.block_bytes + ((size_t)head * tiles + slot / kTile) * kv.tile_bytes;
  uint8_t* vt = tile + half_tile(kv);
  if (kv.type == KvType::kInt4) {
    store_int4(kv, k, tile, 0, t);
    store_int4(kv, v, tile, 1, t);
    return;
  }
  if (kv.type == KvType::kInt8) {
    float* scales = (float*)(tile + 2 * half_tile(kv));
    for (int part = 0; part < 2; ++part) {
      const float* x = part ? v : k;
      F16 top = {};
      for (int i = 0; i < d; i += 16) top = vmax(top, vabs(load_to(x, i, d)));
      float scale, mul = reciprocal_scale(reduce_max(top), &scale);
      if (kv.fixed) scale = mul = 1.f;
      const float least = kv.fixed ? -128.f : -127.f;
      scales[part * kTile + t] = scale;
      for (int i = 0; i < d; i += 16) {
        I16 c = to_int(vmin(vmax(load_to(x, i, d) * mul, splat(least)), splat(127.f)));
        const int n = d - i < 16 ? d - i : 16;
        for (int j = 0; j < n; ++j) {
          if (part) ((int8_t*)vt)[(size_t)t * d + i + j] = (int8_t)c[j];
          else tile[(size_t)((i + j) / 4) * 64 + t * 4 + (i + j) % 4] = (uint8_t)(c[j] + 128);
        }
      }
    }
    return;
  }
  for (int i = 0; i < d; i += 16) {
    const int n = d - i < 16 ? d - i : 16;
    F16 a = load_to(k, i, d), b = load_to(v, i, d);
    if (kv.type == KvType::kFp8) {
      B16 ka = float_to_fp8(a), vb = float_to_fp8(b);
      for (int j = 0; j < n; ++j) tile[(size_t)(i + j) * kTile + t] = ka[j];
      std::memcpy(vt + (size_t)t * d + i, &vb, (size_t)n);
    } else {
      H16 ka = kv.type == KvType::kBf16 ? to_bf16(a) : to_half(a), vb = kv.type == KvType::kBf16 ? to_bf16(b) : to_half(b);
      for (int j = 0; j < n; ++j) ((uint16_t*)tile)[(size_t)(i + j) * kTile + t] = ka[j];
      std::memcpy((uint16_t*)vt + (size_t)t * d + i, &vb, (size_t)n * 2);
    }
  }
}

template <KvType T>
LB_INLINE F16 widen(const uint8_t* p, size_t i) {
  if (T == KvType::kF16) return load_half((const uint16_t*)p + i);
  if (T == KvType::kBf16) return load_bf16((const uint16_t*)p + i);
  if (T == KvType::kFp8) return fp8_to_float(p + i);
  return to_float(widen_s8(p + i));
}

// K of one tile -> kf[dim][16]; integers are dequantized.
template <KvType T>
LB_INLINE void widen_k(const Kv& kv, const uint8_t* tile, float* kf) {
  if (T == KvType::kInt8) {
    F16 s = load<F16>(tile + 2 * half_tile(kv));
    for (int i = 0; i < kv.dim; i += 4) {
      U16 u = load<U16>(tile + (size_t)i * 16);
      for (int j = 0; j < 4; ++j) {
        I16 c = bits<I16>((u >> (8 * j)) & 0xffu) - splat_i(128);
        store(kf + (size_t)(i + j) * 16, to_float(c) * s);
      }
    }
    return;
  }
  if (T == KvType::kInt4) {
    for (int i = 0; i < kv.dim; i += 8) {
      const uint16_t* side = int4_side(kv, tile, 0, i / kKvGroup);
      const F16 s = load_half(side), low = load_half(side + kTile);
      U16 u = load<U16>(tile + (size_t)i * 8);
      for (int j = 0; j < 4; ++j) {
        store(kf + (size_t)(i + j) * 16, fma(to_float(bits<I16>((u >> (8 * j)) & 15u)), s, low));
        store(kf + (size_t)(i + j + 4) * 16, fma(to_float(bits<I16>((u >> (8 * j + 4)) & 15u)), s, low));
      }
    }
    return;
  }
  for (int i = 0; i < kv.dim; ++i) store(kf + (size_t)i * 16, widen<T>(tile, (size_t)i * 16));
}

// V of the first `tokens` of one int4 tile -> vf[tokens][dim].
LB_INLINE void widen_v_int4(const Kv& kv, const uint8_t* tile, int tokens, float* vf) {
  static const uint32_t shifts[16] = {0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4};
  const U16 shift = load<U16>(shifts);
  for (int i = 0; i < kv.dim; i += 16) {
    const uint16_t* side = int4_side(kv, tile, 1, i / kKvGroup);
    float s[kTile], low[kTile];
    store(s, load_half(side));
    store(low, load_half(side + kTile));
    const uint8_t* codes = tile + half_tile(kv) + i / 2;
    for (int t = 0; t < tokens; ++t) {
      uint8_t twice[16];
      std::memcpy(twice, codes + (size_t)t * kv.dim / 2, 8);
      std::memcpy(twice + 8, twice, 8);
      U16 u = (bits<U16>(widen_u8(twice)) >> shift) & 15u;
      store(vf + (size_t)t * kv.dim + i, fma(to_float(bits<I16>(u)), splat(s[t]), splat(low[t])));
    }
  }
}

// Where the products read keys and values from: a widened buffer, or (few rows) the cache itself, widened in registers.
struct Wide {
  const float* k;
  const float* v;
  int dim;
  static inline __attribute__((always_inline)) F16 key(const Wide& w, int i) { return load<F16>(w.k + (size_t)i * 16); }
  static inline __attribute__((always_inline)) F16 value(const Wide& w, int t, int i) { return load<F16>(w.v + (size_t)t * w.dim + i); }
};
template <KvType T>
struct Cached {
  const uint8_t* k;
  const uint8_t* v;
  const float* v_scale;
  int dim;
  static inline __attribute__((always_inline)) F16 key(const Cached& c, int i) { return widen<T>(c.k, (size_t)i * 16); }
  static inline __attribute__((always_inline)) F16 value(const Cached& c, int t, int i) {
    F16 x = widen<T>(c.v, (size_t)t * c.dim + i);
    return T == KvType::kInt8 ? x * c.v_scale[t] : x;
  }
};

LB_INLINE I16 start_digit(int32_t sum) { return splat_i(-128 * sum); }

struct Rows {  // the state of up to kRowBlock query rows
  float top[kRowBlock], sum[kRowBlock];
  int last[kRowBlock], first[kRowBlock];  // visible positions [first, last]
};

// scores[r][16 tokens] of R rows against one tile.
template <int R, class Source>
LB_INLINE void scores_tile(const float* q, const Source& from, float* s) {
  F16 acc[R] = {};
  for (int i = 0; i < from.dim; ++i) {
    F16 k = Source::key(from, i);
    for (int r = 0; r < R; ++r) acc[r] = fma(k, splat(q[(size_t)r * from.dim + i]), acc[r]);
  }
  for (int r = 0; r < R; ++r) store(s + (size_t)r * kChunk, acc[r]);
}

// out[r][dim] += p[r][t] v[t][dim] for R rows and C x 16 columns from column `at`.
template <int R, int C, class Source>
LB_INLINE void values_tile(const float* p, const Source& from, int at, int tokens, float* out) {
  F16 acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = load<F16>(out + (size_t)r * from.dim + at + 16 * c);
  for (int t = 0; t < tokens; ++t) {
    F16 v[C];
    for (int c = 0; c < C; ++c) v[c] = Source::value(from, t, at + 16 * c);
    for (int r = 0; r < R; ++r) {
      F16 w = splat(p[(size_t)r * kChunk + t]);
      for (int c = 0; c < C; ++c) acc[r][c] = fma(w, v[c], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(out + (size_t)r * from.dim + at + 16 * c, acc[r][c]);
}

template <int R, class Source>
LB_INLINE void values_rows(const float* p, const Source& from, int tokens, float* out) {
  constexpr int kWide = R >= 8 ? 2 : 4;
  int c = 0;
  for (; c + 16 * kWide <= from.dim; c += 16 * kWide) values_tile<R, kWide>(p, from, c, tokens, out);
  for (; c < from.dim; c += 16) values_tile<R, 1>(p, from, c, tokens, out);
}

template <class Source>
void scores_of(int rows, const float* q, const Source& from, float* s) {
  int r = 0;
  for (; r + 8 <= rows; r += 8) scores_tile<8>(q + (size_t)r * from.dim, from, s + (size_t)r * kChunk);
  for (; r + 4 <= rows; r += 4) scores_tile<4>(q + (size_t)r * from.dim, from, s + (size_t)r * kChunk);
  for (; r + 2 <= rows; r += 2) scores_tile<2>(q + (size_t)r * from.dim, from, s + (size_t)r * kChunk);
  if (r < rows) scores_tile<1>(q + (size_t)r * from.dim, from, s + (size_t)r * kChunk);
}
template <class Source>
void values_of(int rows, const float* p, const Source& from, int tokens, float* out) {
  int r = 0;
  for (; r + 8 <= rows; r += 8) values_rows<8>(p + (size_t)r * kChunk, from, tokens, out + (size_t)r * from.dim);
  for (; r + 4 <= rows; r += 4) values_rows<4>(p + (size_t)r * kChunk, from, tokens, out + (size_t)r * from.dim);
  for (; r + 2 <= rows; r += 2) values_rows<2>(p + (size_t)r * kChunk, from, tokens, out + (size_t)r * from.dim);
  if (r < rows) values_rows<1>(p + (size_t)r * kChunk, from, tokens, out + (size_t)r * from.dim);
}

// Mask, cap, exponentiate one chunk in place; rescale what was summed before.
LB_INLINE void soften(Rows& st, int r, int start, int tokens, float* s, float scale, float softcap, float* out, int dim) {
  F16 top = splat(st.top[r]);
  static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const I16 lane = load<I16>(lanes);
  const F16 dead = splat(-3.0e38f);
  for (int t = 0; t < tokens; t += 16) {
    F16 v = load<F16>(s + t) * scale;
    if (softcap > 0.f) v = softcap * (2.f * sigmoid(v * (2.f / softcap)) - 1.f);
    I16 pos = lane + splat_i(start + t);
    v = select(pos > splat_i(st.last[r]), dead, v);
    v = select(pos < splat_i(st.first[r]), dead, v);
    store(s + t, v);
    top = vmax(top, v);
  }
  const float m = reduce_max(top);
  const bool fresh = m > st.top[r];
  F16 total = {};
  for (int t = 0; t < tokens; t += 16) {
    F16 v = load<F16>(s + t);
    F16 e = select(v <= dead, F16{}, vexp(v - m));
    store(s + t, e);
    total += e;
  }
  if (fresh) {
    const float f = st.sum[r] > 0.f ? vexp(splat(st.top[r] - m))[0] : 0.f;
    st.sum[r] *= f;
    for (int i = 0; i < dim; i += 16) store(out + i, load<F16>(out + i) * f);
    st.top[r] = m;
  }
  st.sum[r] += reduce_add(total);
}

// Int8 keys, one token: two-digit query against the bytes of a tile.
struct DigitQuery {
  int32_t sum_high, sum_low;
  float scale;
};
LB_INLINE DigitQuery split_query(const float* q, int dim, int8_t* high, int8_t* low) {
  F16 top = {};
  for (int i = 0; i < dim; i += 16) top = vmax(top, vabs(load_to(q, i, dim)));
  float scale, mul = reciprocal_scale(reduce_max(top), &scale);
  I16 sh = {}, sl = {};
  for (int i = 0; i < dim; i += 16) {
    F16 v = load_to(q, i, dim) * mul;
    const I16 h = within_127(to_int(v));
    const I16 l = within_127(to_int((v - to_float(h)) * 254.f));  // the rest, in [-0.5, 0.5], in steps of 1/254
    store_s8(high + i, h);
    store_s8(low + i, l);
    sh += h;
    sl += l;
  }
  return {reduce_add_i(sh), reduce_add_i(sl), scale};
}

struct Scratch {
  float* q;      // kRowBlock x dim
  float* out;    // kRowBlock x dim
  float* s;      // kRowBlock x kChunk
  float* k;      // one tile
  float* v;      // one tile
  int8_t* digits;  // 2 x kRowBlock x dim
};
size_t attention_scratch(int dim, int group) {
  (void)group;
  return 4 * ((size_t)2 * kRowBlock * dim + kRowBlock * kChunk + 2 * kTile * dim) + 2 * (size_t)kRowBlock * dim + 64 * 8;
}

// Two digits of the query against the bytes of a tile.
LB_INLINE void digit_scores(const uint8_t* tile, F16 key_scale, const int8_t* high, const int8_t* low,
                            const DigitQuery& q, int dim, float* s) {
  I16 h = start_digit(q.sum_high), l = start_digit(q.sum_low);
  for (int d = 0; d < dim; d += 4) {
    B64 k = load<B64>(tile + (size_t)d * 16);
    h = dot4<false>(h, k, splat_i(load_i32(high + d)));
    l = dot4<false>(l, k, splat_i(load_i32(low + d)));
  }
  store(s, fma(to_float(l), splat(1.f / 254.f), to_float(h)) * (key_scale * q.scale));
}

template <KvType T>
void attention_rows(const Kv& kv, const AttnJob& job, int token0, int tokens, const Scratch& b) {
  const int dim = kv.dim, group = job.group, rows = tokens * group;
  Rows st;
  DigitQuery dq[kRowBlock];
  const bool digits = job.decode && T == KvType::kInt8, few = rows <= 8 && T != KvType::kInt4;
  for (int t = 0; t < tokens; ++t)
    for (int g = 0; g < group; ++g) {
      const int r = t * group + g, pos = job.pos0 + token0 + t;
      const float* q = job.q + (size_t)(token0 + t) * job.q_stride + (size_t)g * dim;
      std::memcpy(b.q + (size_t)r * dim, q, (size_t)dim * 4);
      if (digits) dq[r] = split_query(q, dim, b.digits + (size_t)r * dim, b.digits + ((size_t)kRowBlock + r) * dim);
      st.top[r] = -3.0e38f;
      st.sum[r] = 0.f;
      st.last[r] = pos;
      st.first[r] = job.window > 0 && pos - job.window + 1 > 0 ? pos - job.window + 1 : 0;
    }
  std::memset(b.out, 0, (size_t)rows * dim * 4);
  const int end = job.pos0 + token0 + tokens;
  for (int c = st.first[0] / kChunk * kChunk; c < end; c += kChunk) {
    const int n_tiles = end - c >= kChunk ? kChunk / kTile : (end - c + kTile - 1) / kTile;
    const uint8_t* tile[kChunk / kTile];
    for (int i = 0; i < n_tiles; ++i) tile[i] = tile_at(kv, job.table, job.kv_head, c + i * kTile);
    const Wide wide{b.k, b.v, dim};
    for (int i = 0; i < n_tiles; ++i) {
      const Cached<T> cached{tile[i], tile[i] + half_tile(kv), (const float*)(tile[i] + 2 * half_tile(kv)) + kTile, dim};
      if (digits) {
        const F16 ks = load<F16>(tile[i] + 2 * half_tile(kv));
        for (int r = 0; r < rows; ++r)
          digit_scores(tile[i], ks, b.digits + (size_t)r * dim, b.digits + ((size_t)kRowBlock + r) * dim, dq[r], dim,
                       b.s + (size_t)r * kChunk + i * 16);
      } else if (few && T != KvType::kInt8) {
        scores_of(rows, b.q, cached, b.s + i * 16);
      } else {
        widen_k<T>(kv, tile[i], b.k);
        scores_of(rows, b.q, wide, b.s + i * 16);
      }
    }
    for (int r = 0; r < rows; ++r)
      soften(st, r, c, n_tiles * 16, b.s + (size_t)r * kChunk, job.scale, job.softcap, b.out + (size_t)r * dim, dim);
    for (int i = 0; i < n_tiles; ++i) {
      // Lanes past the end were never written: 0 * garbage could be NaN, so those tokens are not read.
      const int valid = end - (c + i * kTile) < kTile ? end - (c + i * kTile) : kTile;
      const Cached<T> cached{tile[i], tile[i] + half_tile(kv), (const float*)(tile[i] + 2 * half_tile(kv)) + kTile, dim};
      if (few) {
        values_of(rows, b.s + i * 16, cached, valid, b.out);
      } else if (T == KvType::kInt4) {
        widen_v_int4(kv, tile[i], valid, b.v);
        values_of(rows, b.s + i * 16, wide, valid, b.out);
      } else {
        for (int t = 0; t < valid; ++t)
          for (int d = 0; d < dim; d += 16) store(b.v + (size_t)t * dim + d, Cached<T>::value(cached, t, d));
        values_of(rows, b.s + i * 16, wide, valid, b.out);
      }
    }
  }
  for (int t = 0; t < tokens; ++t)
    for (int g = 0; g < group; ++g) {
      const int r = t * group + g;
      float* o = job.out + (size_t)(token0 + t) * job.out_stride + (size_t)g * dim;
      const float inv = 1.f / st.sum[r];
      for (int i = 0; i < dim; ++i) o[i] = b.out[(size_t)r * dim + i] * inv;
    }
}

void attention(const Kv& kv, const AttnJob& job, uint8_t* scratch) {
  Scratch b;
  b.q = (float*)scratch;
  b.out = b.q + (size_t)kRowBlock * kv.dim;
  b.s = b.out + (size_t)kRowBlock * kv.dim;
  b.k = b.s + (size_t)kRowBlock * kChunk;
  b.v = b.k + (size_t)kTile * kv.dim;
  b.digits = (int8_t*)(b.v + (size_t)kTile * kv.dim);
  const auto rows = kv.type == KvType::kF16    ? attention_rows<KvType::kF16>
                    : kv.type == KvType::kBf16 ? attention_rows<KvType::kBf16>
                    : kv.type == KvType::kInt8 ? attention_rows<KvType::kInt8>
                    : kv.type == KvType::kInt4 ? attention_rows<KvType::kInt4>
                                               : attention_rows<KvType::kFp8>;
  const int step = kRowBlock / job.group > 0 ? kRowBlock / job.group : 1;
  for (int t = 0; t < job.n_tokens; t += step)
    rows(kv, job, t, job.n_tokens - t < step ? job.n_tokens - t : step, b);
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
