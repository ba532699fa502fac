// The seam between orchestration (decoder, Python ops) and arithmetic (one table of functions per instruction set).
//
// Linear weights, all integer kinds. Rows are cut into *panels* of 16 (one row per 32-bit lane), columns into *blocks*
// of 32. One block of `b`-bit codes is 64 b bytes, and a panel's blocks follow each other, so a matrix-vector product
// reads one straight line of memory:
//
//   8 bits   8 vectors: vector j holds, for lane r, the codes of columns 4j .. 4j+3 as bytes
//   4 bits   4 vectors: low nibbles are the 8-bit layout's vector 2j, high nibbles vector 2j+1
//   2 bits   2 vectors: bit pairs 0..3 of vector j are the 8-bit vectors 4j .. 4j+3
//   3 bits   3 vectors: bits 0..2 of vector i are 8-bit vector 2i, bits 3..5 vector 2i+1; bits 6..7 of the first two
//            are the high bits of vectors 6 and 7, whose low bits are bits 6 and 7 of the third (see stream.h)
//   table    like 4 bits, but transposed so that one 128-bit lane holds one row (see lut.h)
//   lattice  1 or 2 vectors: an index, and signs, of 8 columns each (see lattice.h)
//
// Codes are stored unsigned; `zero` is what the stored code of the value 0 is, so W = (code - zero) * scale.
// A product of a block with int8 activations is exact in int32. Every `fold` columns (one activation scale) the sum
// leaves the integers, every `segment` columns (at most one weight scale) it meets the weight's scale:
//   part += float(sum) * activation scale        total += part * weight scale
// and that, in increasing k, is all the float arithmetic there is. It is the same for 1 row and for 512, for every
// thread count: prefill, batched decode and single decode of a linear agree bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

constexpr int kPanel = 16;   // rows per panel
constexpr int kBlock = 32;   // columns per block
constexpr int kFewRows = 8;  // up to here a product is a matrix-vector one, which reads activations row by row
constexpr int kKvGroup = 32;  // dims of a head that share a scale in an int4 cache
constexpr int kMaxFold = 512;  // longest run of columns in int32; also the depth of the GEMM's unpacked slab

enum class Kind : int32_t { kInt = 0, kTable = 1, kBf16 = 2, kLattice = 3 };
enum class ScaleType : int32_t { kF32 = 0, kBf16 = 1, kF16 = 2 };
enum class KvType : int32_t { kF16 = 0, kBf16 = 1, kInt8 = 2, kFp8 = 3, kInt4 = 4 };

struct Weight {
  Kind kind = Kind::kInt;
  int32_t bits = 4;
  int32_t rows = 0, cols = 0;        // logical
  int32_t panels = 0, blocks = 0;    // ceil(rows / 16) (even for bf16), ceil(cols / 32)
  int32_t group = 0;                 // columns per scale; >= cols: one per row
  int32_t n_groups = 1;
  int32_t fold = 32;                 // columns per int32 sum
  int32_t segment = 32;              // multiple of fold, divides group and kMaxFold: columns per float part
  int32_t zero = 8;                  // of symmetric weights: a power of two up to 128
  ScaleType scale_type = ScaleType::kF32;
  const uint8_t* codes = nullptr;    // panels x blocks x 64 bits bytes
  const uint8_t* scales = nullptr;   // panels x n_groups x 16 of scale_type
  const uint8_t* zeros = nullptr;    // panels x n_groups x 16 u8, or null
  const uint8_t* table = nullptr;    // panels x 16 rows x 16 u8 entries (value + 128); of a lattice: see lattice.h
  const float* bias = nullptr;       // rows, or null
};

// Activations of m rows. q rows are `stride` bytes apart; scale and sum have stride / fold entries a row, that of
// bf16 pairs is `stride` elements.
struct Act {
  const int8_t* q = nullptr;
  const float* scale = nullptr;
  const int32_t* sum = nullptr;  // minus the sum of a fold's codes
  const uint16_t* bf16 = nullptr;
  const float* f32 = nullptr;  // if set, nothing else is read: products with float activations
  int8_t* tiles = nullptr;       // more than 8 rows, or a lattice: q, scale and sum again, as pack_tile puts them
  float* tile_scale = nullptr;
  int32_t* tile_sum = nullptr;
  int32_t stride = 0;
  int32_t fold = 32;
};

// One layer's cache: blocks of `block` tokens (a multiple of 16) found through a table. In a block, for each kv head,
// block / 16 tiles; a tile is K (head_dim x 16 tokens), V (16 tokens x head_dim), then for int8 16 K and 16 V scales
// as float. K is stored with tokens in the lanes, so scores need no horizontal sums; int8 K in quads of 4 dims, ready
// for the byte dot product, offset by 128.
//
// Int4: value = code * scale + low, one of each (as halves) for kKvGroup dims of a token. A byte of K holds the dims i
// and i + 4 of eight, a byte of V the dims i and i + 8 of sixteen; then for K and then for V, group by group, 16 scales
// and 16 lows. `fixed`: the caller has divided by stored scales, integers are rounded as they come (scale 1).
struct Kv {
  KvType type = KvType::kF16;
  bool fixed = false;
  int32_t heads = 0, dim = 0, block = 32;
  uint8_t* base = nullptr;
  size_t tile_bytes = 0, block_bytes = 0;
};

struct AttnJob {
  const float* q = nullptr;     // first row's query heads of this kv head
  size_t q_stride = 0;          // floats between tokens
  float* out = nullptr;
  size_t out_stride = 0;
  int32_t n_tokens = 0;         // query tokens, at positions pos0 ..
  int32_t group = 1;            // query heads per kv head
  int32_t pos0 = 0;
  int32_t kv_head = 0;
  int32_t window = 0;           // 0: all before
  float scale = 1.f, softcap = 0.f;
  bool decode = false;          // one token: int8 scores straight from int8 keys
  const int32_t* table = nullptr;
};

enum class Grid : int { kInt, kTable, kFp8 };

// A block of columns that are rounded one after the other (columns.h); arrays are (columns, out) unless said otherwise.
struct Sweep {
  int columns = 0, out = 0, scales = 0, entries = 0;
  Grid kind = Grid::kInt;
  float* x = nullptr;             // slopes, which are kept up
  float* value = nullptr;         // what is rounded
  const float* matrix = nullptr;  // (columns, columns): the curvature, of which the upper triangle is read
  const float* scale = nullptr;   // (scales, out)
  const float* zero = nullptr;    // (scales, out), or null
  const int32_t* index = nullptr; // (columns,): which scale
  const float* table = nullptr;   // (entries, out), ascending; kTable
  float lowest = 0.f, highest = 0.f;
};

constexpr int kGramRows = 512, kGramPanel = 32;  // packed at once; columns of a panel

struct Kernels {
  const char* name;
  // out[m, row] (+)= W a for panels [p0, p1) and rows [0, m). scratch: linear_scratch bytes, 64-aligned.
  void (*linear)(const Weight& w, const Act& a, int m, int p0, int p1, float* out, size_t ldo, bool add, uint8_t* scratch);
  size_t linear_scratch;  // plus 128 bytes a row
  int tile_rows;
  // Rows of one tile (tile_rows of them, at the end fewer) from a.q, a.scale, a.sum to their places in a.tiles, ...
  void (*pack_tile)(const Act& a, int tile, int rows);
  // y = x / rms(x) * weight (or x when weight is null), then int8 groups of `fold` (scale shared by `group` columns,
  // group >= n: the whole row) and/or bf16 and/or float.
  void (*norm_quant)(const float* x, const float* weight, float eps, int n, int stride, int fold, int group, int8_t* q,
                     float* scale, int32_t* sum, uint16_t* bf16, float* y);
  void (*glu)(const float* gate, const float* up, float* h, int n, int act);  // act: 0 silu, 1 gelu (tanh form)
  void (*rope)(float* x, int dim, int rot, const float* cos, const float* sin);
  void (*kv_store)(const Kv& kv, const float* k, const float* v, int head, int block, int slot);
  void (*attention)(const Kv& kv, const AttnJob& job, uint8_t* scratch);
  size_t (*attention_scratch)(int dim, int group);
  void (*hadamard)(float* x, int n, float scale);
  void (*rows_to_float)(const void* src, int type, float* dst, int n, float scale);  // 0 f32, 1 bf16, 2 f16
  int32_t (*argmax)(const float* x, int n);
  void (*softcap)(float* x, int n, float cap);
  // Rows of bf16 (rows, stride), at most kGramRows, as pairs: one panel of `packed` (gram.cpp), ...
  void (*gram_pack)(const uint16_t* x, size_t stride, int rows, int width, int panel, uint32_t* packed);
  // ... the lower triangle of sum (width, width) += XᵀX in that panel, ...
  void (*gram_add)(const uint32_t* packed, int rows, int width, int panel, float* sum);
  // ... and what that panel is of totals[k] += Σ x H xᵀ for each symmetric H (width, width) of `matrices`.
  void (*gram_weighted)(const uint32_t* packed, int rows, int width, int panel, const float* const* matrices, int count,
                        double* totals);
  void (*sweep)(const Sweep& s, uint8_t* scratch);  // scratch: sweep_scratch(s), 64-aligned
  size_t (*sweep_scratch)(const Sweep& s);
  // Instead: value (scales, out) = each scale's squared error over the columns of x, weighted by matrix (columns,).
  void (*grid_errors)(const Sweep& s, uint8_t* scratch);
  size_t (*errors_scratch)(const Sweep& s);
  uint64_t (*read)(const uint8_t* p, size_t n, int pattern);
  uint64_t (*ops_int8)(size_t iterations);  // arithmetic ceiling: 16 x 128 operations an iteration
};

const Kernels* select_kernels();                     // best for this CPU, or what LOWBIT_ISA names
const Kernels* kernels_by_name(const char* name);    // null: not built in, or the CPU cannot run it

}  // namespace lowbit
