// Integer weights times int8 activations: one row up to many.
//
// Few rows (decode): memory is the limit. A panel's codes are read once, spread to bytes in registers, and multiplied
// with up to kGemvRows activation rows. One panel at a time: two side by side compute 5 % faster in the cache, and read
// 12 % slower from memory. Per block of 4 bits that is 4 loads, 8 bit operations and 8 byte dot products
// for 256 bytes, so even one core could take in twice what memory gives.
//
// Many rows (prefill): arithmetic is the limit. Two panels x 512 columns are spread once into a 16 KiB slab that stays
// in the first cache; a tile of 2 panels x 6 rows then keeps 12 integer and 12 float sums in registers and needs 8
// loads for 12 dot products. Activations come in tiles too (pack_tile). With an activation scale every 32 columns a sum costs one conversion and one
// multiply-add per 8 dot products; the weight's scale comes in once a segment.
#pragma once

#include "fold.h"

namespace lowbit {
namespace LOWBIT_ISA {

// Spread one block to 8 vectors of bytes in the 8-bit layout. HIGH leaves the odd vectors of 4 bits sixteen times too
// large: a shift less each, made up for once a fold.
template <int BITS, bool HIGH = false>
LB_INLINE void spread(const uint8_t* p, B64 w[8]) {
  if (BITS == 8) {
    for (int j = 0; j < 8; ++j) w[j] = load<B64>(p + 64 * j);
  } else if (BITS == 4) {
    for (int j = 0; j < 4; ++j) {
      H32 v = load<H32>(p + 64 * j);
      w[2 * j] = bits<B64>(v & 0x0f0f);
      w[2 * j + 1] = bits<B64>(HIGH ? v & 0xf0f0 : (v >> 4) & 0x0f0f);
    }
  } else if (BITS == 3) {
    H32 v[3];
    for (int i = 0; i < 3; ++i) {
      v[i] = load<H32>(p + 64 * i);
      w[2 * i] = bits<B64>(v[i] & 0x0707);
      w[2 * i + 1] = bits<B64>((v[i] >> 3) & 0x0707);
    }
    for (int i = 0; i < 2; ++i) w[6 + i] = bits<B64>(((v[i] >> 5) & 0x0606) | ((v[2] >> (6 + i)) & 0x0101));
  } else {
    for (int j = 0; j < 2; ++j) {
      H32 v = load<H32>(p + 64 * j);
      for (int i = 0; i < 4; ++i) w[4 * j + i] = bits<B64>((v >> (2 * i)) & 0x0303);
    }
  }
}

template <int BITS, bool ASYM, int M>
LB_INLINE void gemv_panel(const Weight& w, const Act& a, int row0, int panel, float* out, size_t ldo, bool add) {
  constexpr int kBytes = 64 * BITS;
  constexpr bool kTwo = M <= 2;  // a second chain, so that one row alone does not wait on the latency of the first
  constexpr bool kHigh = BITS == 4 && kTwo && kWideDot;
  const uint8_t* p = w.codes + (size_t)panel * w.blocks * kBytes;
  const uint8_t* ps = panel_scales(w, panel);
  const uint8_t* pz = panel_zeros(w, panel);
  const size_t ss = scale_size(w.scale_type) * kPanel;
  const int segments = w.blocks * kBlock / w.segment, folds = w.segment / w.fold, per_fold = w.fold / kBlock;
  const int per_group = w.group >= w.cols ? segments : w.group / w.segment;
  const int8_t* q = a.q + (size_t)row0 * a.stride;
  const int act_folds = a.stride / a.fold;
  const float* as = a.scale + (size_t)row0 * act_folds;
  const int32_t* sums = a.sum + (size_t)row0 * act_folds;
  const int shift = __builtin_ctz((unsigned)w.zero | 256u);
  F16 total[M] = {}, ws = {};
  I16 zero = {};
  for (int g = 0, left = 0; g < segments; ++g) {
    if (left == 0) {
      ws = load_scale(ps, w.scale_type);
      ps += ss;
      if (ASYM) {
        zero = load_zero(pz);
        pz += kPanel;
      }
      left = per_group;
    }
    --left;
    F16 part[M] = {};
    for (int f = 0; f < folds; ++f, ++as, ++sums) {
      I16 acc[M], odd[M] = {};
      for (int m = 0; m < M; ++m)
        acc[m] = ASYM ? start_sum(zero, sums[m * act_folds]) : start_sum(shift, sums[m * act_folds]);
      for (int b = 0; b < per_fold; ++b, p += kBytes, q += kBlock) {
        B64 x[8];
        spread<BITS, kHigh>(p, x);
        for (int m = 0; m < M; ++m)
          for (int j = 0; j < 8; ++j) {
            I16& sum = kTwo && j % 2 ? odd[m] : acc[m];
            sum = dot4<BITS != 8>(sum, x[j], splat_i(load_i32(q + (size_t)m * a.stride + 4 * j)));
          }
      }
      for (int m = 0; m < M; ++m) {
        if (kTwo) acc[m] += kHigh ? odd[m] >> 4 : odd[m];
        part[m] = fold_in(part[m], acc[m], as[m * act_folds]);
      }
    }
    for (int m = 0; m < M; ++m) total[m] = fma(part[m], ws, total[m]);
  }
  for (int m = 0; m < M; ++m) finish(w, panel, total[m], out + (size_t)(row0 + m) * ldo + panel * kPanel, add);
}

template <int BITS, int M>
void gemv(const Weight& w, const Act& a, int row0, int p0, int p1, float* out, size_t ldo, bool add) {
  for (int panel = p0; panel < p1; ++panel)
    w.zeros ? gemv_panel<BITS, true, M>(w, a, row0, panel, out, ldo, add)
            : gemv_panel<BITS, false, M>(w, a, row0, panel, out, ldo, add);
}

// A slab: NP panels spread to bytes, with scales and zeros already wide.
struct Slab {
  uint8_t codes[kTilePanels][kMaxFold / kBlock][8 * 64];
  float scale[kTilePanels][kMaxFold / kBlock][kPanel];
  int32_t zero[kTilePanels][kMaxFold / kBlock][kPanel];
};

// Rows [tile * kTileRows, ...) of a.q into a.tiles: groups of 4 columns of all rows of a tile follow each other, and so
// do their scales and sums. A tile is then read in one straight line, which the hardware fetches ahead.
void pack_tile(const Act& a, int tile, int rows) {
  const int folds = a.stride / a.fold, row0 = tile * kTileRows;
  int8_t* q = a.tiles + (size_t)row0 * a.stride;
  float* scale = a.tile_scale + (size_t)row0 * folds;
  int32_t* sum = a.tile_sum + (size_t)row0 * folds;
  for (int m = 0; m < rows; ++m) {
    const int8_t* from = a.q + (size_t)(row0 + m) * a.stride;
    for (int k = 0; k < a.stride; k += 4) std::memcpy(q + ((size_t)k / 4 * kTileRows + m) * 4, from + k, 4);
    for (int f = 0; f < folds; ++f) {
      scale[f * kTileRows + m] = a.scale[(size_t)(row0 + m) * folds + f];
      sum[f * kTileRows + m] = a.sum[(size_t)(row0 + m) * folds + f];
    }
  }
}

// NP panels, their bytes `apart` from each other, x M rows over `segments` segments that start at column k0. ONE: a fold
// is a single block. `carry` holds the totals between slabs. Kept apart from its callers, and without a loop over a
// single block, so that the compiler has registers for all sums.
template <bool SMALL, bool ASYM, bool ONE, int NP, int M>
__attribute__((noinline)) void tile(const Slab& s, const uint8_t* c, size_t apart, const Weight& w, const Act& a, int row0,
                                    int k0, int segments, float* carry) {
  constexpr int R = kTileRows;
  const int f0 = k0 / w.fold, folds = w.segment / w.fold;
  const int shift = __builtin_ctz((unsigned)w.zero | 256u);
  const int8_t* q = a.tiles + (size_t)row0 * a.stride + (size_t)k0 * R;
  const float* as = a.tile_scale + (size_t)row0 * (a.stride / a.fold) + (size_t)f0 * R;
  const int32_t* sums = a.tile_sum + (size_t)row0 * (a.stride / a.fold) + (size_t)f0 * R;
  F16 total[NP][M];
  for (int n = 0; n < NP; ++n)
    for (int m = 0; m < M; ++m) total[n][m] = k0 ? load<F16>(carry + (m * NP + n) * kPanel) : F16{};
  for (int g = 0; g < segments; ++g) {
    F16 part[NP][M] = {};
    for (int f = 0; f < folds; ++f, as += R, sums += R) {
      I16 acc[NP][M];
      for (int n = 0; n < NP; ++n)
        for (int m = 0; m < M; ++m)
          acc[n][m] = ASYM ? start_sum(load<I16>(s.zero[n][g]), sums[m]) : start_sum(shift, sums[m]);
      int left = ONE ? 1 : w.fold / kBlock;
      do {
        for (int j = 0; j < 8; ++j) {
          B64 x[NP];
          for (int n = 0; n < NP; ++n) x[n] = load<B64>(c + apart * n + 64 * j);
          for (int m = 0; m < M; ++m) {
            I16 v = splat_i(load_i32(q + (j * R + m) * 4));
            for (int n = 0; n < NP; ++n) acc[n][m] = dot4<SMALL>(acc[n][m], x[n], v);
          }
        }
        q += kBlock * R;
        c += 8 * 64;
      } while (!ONE && --left);
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < NP; ++n) part[n][m] = fold_in(part[n][m], acc[n][m], as[m]);
    }
    for (int n = 0; n < NP; ++n) {
      F16 ws = load<F16>(s.scale[n][g]);
      for (int m = 0; m < M; ++m) total[n][m] = fma(part[n][m], ws, total[n][m]);
    }
  }
  for (int n = 0; n < NP; ++n)
    for (int m = 0; m < M; ++m) store(carry + (m * NP + n) * kPanel, total[n][m]);
}

// One slab for M rows. The caller's `out` is touched once, at the end, and asked for before: stores leave in order, and
// one that waits for memory holds up all behind it.
template <bool SMALL, bool ASYM, int NP, int M>
void tile_rows(const Slab& s, const uint8_t* codes, size_t apart, const Weight& w, const Act& a, int row0, int panel,
               int k0, int k1, float* out, size_t ldo, bool add, float* carry) {
  carry += (size_t)row0 * NP * kPanel;
  out += (size_t)row0 * ldo + panel * kPanel;
  const int segments = (k1 - k0) / w.segment;
  const bool last = k1 == w.blocks * kBlock;
  if (last)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < NP; ++n) prefetch_write(out + m * ldo + n * kPanel);
  w.fold == kBlock ? tile<SMALL, ASYM, true, NP, M>(s, codes, apart, w, a, row0, k0, segments, carry)
                   : tile<SMALL, ASYM, false, NP, M>(s, codes, apart, w, a, row0, k0, segments, carry);
  if (!last) return;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NP; ++n)
      finish(w, panel + n, load<F16>(carry + (m * NP + n) * kPanel), out + m * ldo + n * kPanel, add);
}

template <bool SMALL, bool ASYM, int NP>
void tile_all(const Slab& s, const uint8_t* codes, size_t apart, const Weight& w, const Act& a, int m, int panel, int k0,
              int k1, float* out, size_t ldo, bool add, float* carry) {
  int row = 0;
  for (; row + kTileRows <= m; row += kTileRows)
    tile_rows<SMALL, ASYM, NP, kTileRows>(s, codes, apart, w, a, row, panel, k0, k1, out, ldo, add, carry);
  const int rest = m - row;
#define LB_REST(M)                    \
  if (M < kTileRows && rest == M)     \
    tile_rows<SMALL, ASYM, NP, (M < kTileRows ? M : 1)>(s, codes, apart, w, a, row, panel, k0, k1, out, ldo, add, carry)
  LB_REST(1);
  LB_REST(2);
  LB_REST(3);
  LB_REST(4);
  LB_REST(5);
#undef LB_REST
}

void table_spread(const Weight& w, int panel, int block, uint8_t* dst);
void lattice_spread(const Weight& w, int panel, int block, uint8_t* dst);

LB_INLINE void spread_block(const Weight& w, int panel, int block, uint8_t* dst) {
  if (w.kind == Kind::kTable) return table_spread(w, panel, block, dst);
  if (w.kind == Kind::kLattice) return lattice_spread(w, panel, block, dst);
  const uint8_t* p = w.codes + ((size_t)panel * w.blocks + block) * 64 * w.bits;
  B64 x[8];
  switch (w.bits) {
    case 2: spread<2>(p, x); break;
    case 3: spread<3>(p, x); break;
    case 4: spread<4>(p, x); break;
    default: spread<8>(p, x); break;
  }
  for (int j = 0; j < 8; ++j) store(dst + 64 * j, x[j]);
}

template <int NP>
void gemm_panels(const Weight& w, const Act& a, int m, int panel, float* out, size_t ldo, bool add, Slab& s,
                 float* carry) {
  const int depth = w.blocks * kBlock, step = kMaxFold;
  const bool small = w.kind != Kind::kTable && w.bits < 8;
  const bool bytes = w.kind == Kind::kInt && w.bits == 8;  // nothing to spread: read where they lie
  const size_t ss = scale_size(w.scale_type) * kPanel;
  const size_t apart = bytes ? (size_t)w.blocks * 8 * 64 : sizeof(s.codes[0]);
  for (int k0 = 0; k0 < depth; k0 += step) {
    const int k1 = k0 + step < depth ? k0 + step : depth;
    const uint8_t* codes = bytes ? w.codes + ((size_t)panel * w.blocks + k0 / kBlock) * 8 * 64 : s.codes[0][0];
    for (int n = 0; n < NP; ++n) {
      if (!bytes)
        for (int b = k0 / kBlock; b < k1 / kBlock; ++b) spread_block(w, panel + n, b, s.codes[n][b - k0 / kBlock]);
      for (int k = k0, i = 0; k < k1; k += w.segment, ++i) {
        const int g = w.group >= w.cols ? 0 : k / w.group;
        store(s.scale[n][i], load_scale(panel_scales(w, panel + n) + g * ss, w.scale_type));
        if (w.zeros) store(s.zero[n][i], load_zero(panel_zeros(w, panel + n) + (size_t)g * kPanel));
      }
    }
    const auto all = small ? (w.zeros ? tile_all<true, true, NP> : tile_all<true, false, NP>)
                           : (w.zeros ? tile_all<false, true, NP> : tile_all<false, false, NP>);
    all(s, codes, apart, w, a, m, panel, k0, k1, out, ldo, add, carry);
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
