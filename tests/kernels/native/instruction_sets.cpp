// Every instruction set of this machine against the portable one, without Python: what an emulator of another
// architecture can run (`make neon`). The portable kernels are held against the torch twins by the Python tests.
//
// Operands are random and adversarial: zeros, the largest codes of both signs, subnormals, values near the largest
// float, odd rows and columns, unaligned pointers. Integer work and roundings must agree bit for bit; floats may differ
// by the rounding of a fused multiply-add.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "decoder.h"
#include "gram_threads.h"
#include "pack.h"

using namespace lowbit;

static std::mt19937_64 rng(7);
static int checks = 0, failures = 0;
static std::string where;

static int below(int n) { return (int)(rng() % (uint64_t)n); }
static float normal() { return std::normal_distribution<float>(0, 1)(rng); }

static void report(const char* what, double error) {
  ++failures;
  std::printf("FAILED %s: %s (error %g)\n", where.c_str(), what, error);
}

// Largest difference against the largest magnitude; a NaN or infinity must stand in the same place.
static void near(const char* what, const std::vector<float>& a, const std::vector<float>& b, double tolerance) {
  double top = 1e-37, worst = 0;
  for (size_t i = 0; i < a.size(); ++i)
    if (std::isfinite(a[i])) top = std::fmax(top, std::fabs(a[i]));
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isfinite(a[i]) && std::isfinite(b[i]))
      worst = std::fmax(worst, std::fabs((double)a[i] - b[i]) / top);
    else if (std::isnan(a[i]) != std::isnan(b[i]) || (!std::isnan(a[i]) && a[i] != b[i]))
      worst = INFINITY;
  }
  ++checks;
  if (!(worst <= tolerance)) report(what, worst);
}

template <class T>
static void same(const char* what, const std::vector<T>& a, const std::vector<T>& b) {
  ++checks;
  if (a.size() != b.size() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T))) report(what, 1);
}

enum Pattern { kRandom, kZeros, kLargest, kSubnormal, kHuge, kMixed, kPatterns };

static std::vector<float> floats(size_t n, int pattern) {
  std::vector<float> x(n);
  for (float& v : x) switch (pattern) {
      case kZeros: v = below(2) ? 0.f : -0.f; break;
      case kLargest: v = below(2) ? 127.f : -127.f; break;
      case kSubnormal: v = normal() * 1e-39f; break;
      case kHuge: v = normal() * 1e37f; break;
      case kMixed: v = normal() * std::pow(10.f, (float)below(12) - 6); break;
      default: v = normal();
    }
  return x;
}

// 64-byte aligned memory, or `off` bytes away from it.
struct Bytes {
  std::vector<uint8_t> data;
  uint8_t* p;
  explicit Bytes(size_t n, size_t off = 0) : data(n + 192) {
    p = data.data() + (64 - (uintptr_t)data.data() % 64) % 64 + off;
  }
};

static uint16_t bf16_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return (uint16_t)(u >> 16);
}

// Any 256 vectors of lattice.h's form: E8P of 2, 6 and 10 with their planes; or nibbles with theirs.
static std::vector<uint8_t> codebook(int bits) {
  std::vector<uint8_t> t(3072);
  for (int i = 0; i < 2048; ++i) t[i] = (uint8_t)(bits == 2 ? 2 + 4 * below(3) : below(16));
  for (int i = 0; i < 2048; ++i)
    for (int plane = 0; plane < 4; ++plane) {
      const int set = bits == 2 ? t[i] == 6 + 4 * plane : t[i] >> (3 - plane) & 1;
      t[2048 + 256 * plane + i / 8] |= (uint8_t)(set << i % 8);
    }
  return t;
}

static void check_linear(const Kernels& k, const Kernels& oracle, int bits, bool asym, ScaleType type, int rows, int cols,
                         int group, bool whole, int m, int pattern) {
  const bool table = bits == 0, bf16 = bits == 16, lattice = bits < 0;
  Weight w;
  w.kind = table ? Kind::kTable : bf16 ? Kind::kBf16 : lattice ? Kind::kLattice : Kind::kInt;
  w.bits = table ? 4 : std::abs(bits), w.rows = rows, w.cols = cols, w.group = group;
  w.panels = panels_of(w.kind, rows), w.blocks = (cols + kBlock - 1) / kBlock, w.n_groups = (cols + group - 1) / group;
  const int wide = w.blocks * kBlock, most = whole ? kMaxFold : 32;
  for (w.fold = most; wide % w.fold || (group < cols && group % w.fold);) w.fold /= 2;
  for (w.segment = w.fold; w.segment * 2 <= kMaxFold && wide % (2 * w.segment) == 0 &&
                           (group >= cols || group % (2 * w.segment) == 0);)
    w.segment *= 2;
  const int top = 1 << w.bits;
  w.zero = table ? 128 : lattice ? 16 : top / 2, w.scale_type = type;
  Bytes codes(packed_bytes(w.kind, w.bits, rows, cols), below(2) ? 0 : 13);
  w.codes = codes.p;
  if (bf16) {
    std::vector<uint16_t> raw((size_t)rows * cols);
    for (auto& v : raw) v = bf16_bits(normal());
    pack_bf16(raw.data(), rows, cols, (uint16_t*)codes.p);
  } else if (lattice) {
    for (size_t i = 0; i < packed_bytes(w.kind, w.bits, rows, cols); ++i) codes.p[i] = (uint8_t)below(256);
  } else {
    std::vector<uint8_t> raw((size_t)rows * cols);
    for (auto& v : raw) v = (uint8_t)(pattern == kLargest ? (below(2) ? top - 1 : 0) : below(top));
    table ? pack_table(raw.data(), rows, cols, codes.p) : pack_int(raw.data(), w.bits, rows, cols, (uint8_t)w.zero, codes.p);
  }
  const size_t n = (size_t)w.panels * kPanel * w.n_groups;
  std::vector<float> scale = floats(n, pattern == kLargest ? kRandom : pattern == kHuge ? kSubnormal : pattern);
  std::vector<uint16_t> half(n);
  for (size_t i = 0; i < n; ++i) half[i] = type == ScaleType::kBf16 ? bf16_bits(scale[i]) : (uint16_t)below(0x7c00);
  w.scales = type == ScaleType::kF32 ? (uint8_t*)scale.data() : (uint8_t*)half.data();
  std::vector<uint8_t> zeros(n), entries((size_t)w.panels * 256);
  for (auto& z : zeros) z = (uint8_t)below(256);
  for (auto& e : entries) e = (uint8_t)(1 + below(255));
  if (lattice) entries = codebook(w.bits);
  if (asym && bits > 0 && !bf16) w.zeros = zeros.data();
  w.table = entries.data();
  const std::vector<float> bias = floats(rows, kRandom), x = floats((size_t)m * wide, pattern);
  if (below(2)) w.bias = bias.data();

  const int folds = wide / w.fold;
  std::vector<int8_t> q((size_t)m * wide + 64);
  std::vector<float> as((size_t)m * folds + 16);
  std::vector<int32_t> sums((size_t)m * folds + 16);
  std::vector<uint16_t> pairs((size_t)m * wide);
  for (int i = 0; i < m; ++i)
    oracle.norm_quant(&x[(size_t)i * wide], nullptr, 0, cols, wide, w.fold, whole ? wide : w.fold, &q[(size_t)i * wide],
                      &as[(size_t)i * folds], &sums[(size_t)i * folds], &pairs[(size_t)i * wide], nullptr);
  for (bool exact : {false, true}) {
    Act a;
    a.q = q.data(), a.scale = as.data(), a.sum = sums.data(), a.bf16 = pairs.data(), a.stride = wide, a.fold = w.fold;
    if (exact) a.f32 = x.data();
    const bool add = below(2);
    std::vector<float> expected = floats((size_t)m * rows, kRandom), got = expected;
    for (const Kernels* each : {&oracle, &k}) {
      Bytes scratch(each->linear_scratch + (size_t)m * 128 + 64);
      const size_t tiled = (size_t)m + each->tile_rows;
      std::vector<int8_t> tiles(tiled * wide);
      std::vector<float> tile_scale(tiled * folds);
      std::vector<int32_t> tile_sum(tiled * folds);
      a.tiles = tiles.data(), a.tile_scale = tile_scale.data(), a.tile_sum = tile_sum.data();
      for (int t = 0; t * each->tile_rows < m; ++t)
        each->pack_tile(a, t, std::min(each->tile_rows, m - t * each->tile_rows));
      each->linear(w, a, m, 0, w.panels, (each == &k ? got : expected).data(), rows, add, scratch.p);
    }
    where = std::string(k.name) + " linear " + (table ? "table" : lattice ? "lattice" : std::to_string(bits) + " bits") + (asym ? " asym" : "") +
            " rows " + std::to_string(rows) + " cols " + std::to_string(cols) + " group " + std::to_string(group) + " m " +
            std::to_string(m) + " pattern " + std::to_string(pattern) + (exact ? " float" : "");
    near("out", expected, got, exact || bf16 ? 2e-5 : 4e-6);
  }
}

static void check_linears(const Kernels& k, const Kernels& oracle) {
  const int shapes[][3] = {{16, 32, 32}, {33, 320, 64}, {70, 96, 32}, {17, 100, 100}, {1, 32, 32}, {40, 1024, 256}};
  for (int bits : {-1, -2, 0, 2, 3, 4, 8, 16})
    for (bool asym : {false, true})
      for (const auto& s : shapes)
        for (int m : {1, 2, 3, 4, 7, 8, 9, 14})
          check_linear(k, oracle, bits, asym, (ScaleType)below(3), s[0], s[1], s[2], below(2), m, below(kPatterns));
}

static void check_grams(const Kernels& k, const Kernels& oracle) {
  for (int rows : {1, 2, 7, 257, 513})
    for (int width : {1, 16, 31, 40, 100}) {
      const std::vector<float> x = floats((size_t)rows * width, kRandom);
      std::vector<uint16_t> bf16(x.size());
      for (size_t i = 0; i < x.size(); ++i) bf16[i] = bf16_bits(x[i]);
      const std::vector<float> start = floats((size_t)width * width, kRandom), other = floats((size_t)width * width, kRandom);
      std::vector<float> expected = start, got = start;
      add_gram(oracle, bf16.data(), rows, width, expected.data(), 1);
      add_gram(k, bf16.data(), rows, width, got.data(), 2);
      where = std::string(k.name) + " gram " + std::to_string(rows) + " x " + std::to_string(width);
      near("sum", expected, got, 2e-5);
      const std::vector<const float*> matrices = {start.data(), other.data()};
      const std::vector<double> a = quadratic_forms(oracle, bf16.data(), rows, width, matrices, 1);
      const std::vector<double> b = quadratic_forms(k, bf16.data(), rows, width, matrices, 2);
      double most = 0;  // signs differ: against Σ |x_i H_ij x_j|
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < width; ++i)
          for (int j = 0; j < width; ++j)
            most += std::fabs(x[(size_t)r * width + i] * x[(size_t)r * width + j]) * std::fabs(start[(size_t)i * width + j]);
      for (size_t i = 0; i < a.size(); ++i) {
        ++checks;
        if (!(std::fabs(a[i] - b[i]) <= 1e-5 * most)) report("forms", std::fabs(a[i] - b[i]) / most);
      }
    }
}

// Every operation of a sweep is fixed to the last bit, so the results are equal, not near.
static void check_sweeps(const Kernels& k, const Kernels& oracle) {
  for (int kind = 0; kind < 4; ++kind)  // integers, table, fp8, integers with zero points
    for (int columns : {1, 5, 128})
      for (int out : {1, 64, 70}) {
        const int scales = 2, entries = kind == 1 ? 6 : 0;
        std::vector<float> matrix = floats((size_t)columns * columns, kRandom), scale = floats((size_t)scales * out, kRandom);
        std::vector<float> zero((size_t)scales * out, 3.f), table((size_t)entries * out);
        std::vector<int32_t> index(columns);
        for (int i = 0; i < columns; ++i) {
          index[i] = i % scales;
          for (int j = 0; j < columns; ++j) matrix[(size_t)i * columns + j] *= 1.f / columns;
          matrix[(size_t)i * columns + i] = 1.f;
        }
        for (float& x : scale) x = 0.1f + std::fabs(x);
        for (size_t i = 0; i < table.size(); ++i) table[i] = (float)(i / out) - 2.5f;
        std::vector<float> x[2], value[2];
        x[0] = x[1] = floats((size_t)columns * out, kRandom);
        value[0] = value[1] = floats((size_t)columns * out, kRandom);
        for (int i = 0; i < 2; ++i) {
          Sweep s;
          s.columns = columns, s.out = out, s.scales = scales, s.entries = entries;
          s.kind = kind == 3 ? Grid::kInt : (Grid)kind, s.x = x[i].data(), s.value = value[i].data();
          s.matrix = matrix.data(), s.scale = scale.data(), s.zero = kind == 3 ? zero.data() : nullptr;
          s.index = index.data(), s.table = table.data(), s.lowest = kind == 3 ? 0.f : -8.f, s.highest = kind == 3 ? 15.f : 7.f;
          const Kernels& each = i ? k : oracle;
          Bytes scratch(each.sweep_scratch(s));
          each.sweep(s, scratch.p);
        }
        where = std::string(k.name) + " sweep " + std::to_string(kind) + ", " + std::to_string(columns) + " x " + std::to_string(out);
        near("x", x[0], x[1], 0), near("value", value[0], value[1], 0);
      }
}

static void check_norms(const Kernels& k, const Kernels& oracle) {
  for (int pattern = 0; pattern < kPatterns; ++pattern)
    for (int n : {1, 16, 31, 100, 512})
      for (bool weighted : {false, true})
        for (bool row : {false, true}) {
          const int stride = (n + 31) / 32 * 32, folds = stride / 32;
          const std::vector<float> x = floats(n, pattern), weight = floats(n, kRandom);
          std::vector<int8_t> q[2];
          std::vector<float> scale[2], y[2], codes[2];
          std::vector<int32_t> sum[2];
          std::vector<uint16_t> b[2];
          for (int i = 0; i < 2; ++i) {
            q[i].resize(stride), scale[i].resize(folds), sum[i].resize(folds), b[i].resize(stride), y[i].resize(n);
            (i ? k : oracle).norm_quant(x.data(), weighted ? weight.data() : nullptr, 1e-6f, n, stride, 32,
                                        row ? stride : 32, q[i].data(), scale[i].data(), sum[i].data(), b[i].data(), y[i].data());
            codes[i].assign(q[i].begin(), q[i].end());
          }
          where = std::string(k.name) + " norm " + std::to_string(n) + " pattern " + std::to_string(pattern);
          near("y", y[0], y[1], 2e-6);
          near("scale", scale[0], scale[1], 2e-6);
          if (weighted) {  // a last-bit difference of the norm may turn a code
            for (int i = 0; i < stride; ++i)
              if (std::abs(q[0][i] - q[1][i]) > 1) report("code", q[0][i] - q[1][i]);
          } else {
            same("codes", q[0], q[1]), same("sums", sum[0], sum[1]), same("bf16", b[0], b[1]);
          }
          for (int f = 0; f < folds; ++f) {
            int total = 0;
            for (int i = 0; i < 32; ++i) total -= q[1][32 * f + i];
            if (total != sum[1][f]) report("sum of codes", total);
          }
        }
}

static void check_elementwise(const Kernels& k, const Kernels& oracle) {
  for (int pattern = 0; pattern < kPatterns; ++pattern)
    for (int n : {1, 15, 16, 33, 96, 128}) {
      where = std::string(k.name) + " n " + std::to_string(n) + " pattern " + std::to_string(pattern);
      const std::vector<float> a = floats(n, pattern), b = floats(n, kRandom), c = floats(n, kRandom);
      for (int act : {0, 1}) {
        std::vector<float> h[2] = {std::vector<float>(n), std::vector<float>(n)};
        oracle.glu(a.data(), b.data(), h[0].data(), n, act), k.glu(a.data(), b.data(), h[1].data(), n, act);
        near(act ? "gelu" : "silu", h[0], h[1], 3e-6);
      }
      std::vector<float> x = a, y = a;
      oracle.rope(x.data(), n, n / 2 * 2, b.data(), c.data()), k.rope(y.data(), n, n / 2 * 2, b.data(), c.data());
      near("rope", x, y, 1e-6);
      x = y = a;
      oracle.hadamard(x.data(), n, 0.25f), k.hadamard(y.data(), n, 0.25f);
      near("hadamard", x, y, 1e-6);
      x = y = a;
      oracle.softcap(x.data(), n, 30.f), k.softcap(y.data(), n, 30.f);
      near("softcap", x, y, 3e-6);
      std::vector<int32_t> best = {oracle.argmax(a.data(), n)}, also = {k.argmax(a.data(), n)};
      same("argmax", best, also);
    }
  std::vector<uint16_t> every(65536);  // all 16-bit floats there are
  for (int i = 0; i < 65536; ++i) every[i] = (uint16_t)i;
  for (int type : {1, 2}) {
    std::vector<float> x(65536), y(65536);
    oracle.rows_to_float(every.data(), type, x.data(), 65536, 1.f), k.rows_to_float(every.data(), type, y.data(), 65536, 1.f);
    where = std::string(k.name) + (type == 1 ? " every bf16" : " every half");
    near("value", x, y, 0);
  }
}

static void check_attention(const Kernels& k, const Kernels& oracle, KvType type, int dim, int group, int total, int tokens,
                            int pattern) {
  const int heads = 2, block = 32, blocks = (total + block - 1) / block;
  Kv kv;
  kv.type = type, kv.heads = heads, kv.dim = dim, kv.block = block;
  kv.tile_bytes = kv_tile_bytes(type, dim), kv.block_bytes = kv.tile_bytes * heads * (block / 16);
  const std::vector<float> keys = floats((size_t)total * heads * dim, pattern), values = floats(keys.size(), pattern);
  const std::vector<float> q = floats((size_t)tokens * heads * group * dim, kRandom);
  std::vector<int32_t> table(blocks);
  for (int i = 0; i < blocks; ++i) table[i] = blocks - 1 - i;
  std::vector<uint8_t> stored[2];
  std::vector<float> out[2];
  for (int i = 0; i < 2; ++i) {
    const Kernels& each = i ? k : oracle;
    Bytes cache(kv.block_bytes * blocks), scratch(each.attention_scratch(dim, group) + 64);
    kv.base = cache.p;
    for (int t = 0; t < total; ++t)
      for (int h = 0; h < heads; ++h)
        each.kv_store(kv, &keys[((size_t)t * heads + h) * dim], &values[((size_t)t * heads + h) * dim], h, table[t / block],
                      t % block);
    stored[i].assign(cache.p, cache.p + kv.block_bytes * blocks);
    out[i].resize(q.size());
    for (int h = 0; h < heads; ++h) {
      AttnJob j;
      j.q = &q[(size_t)h * group * dim], j.q_stride = (size_t)heads * group * dim;
      j.out = &out[i][(size_t)h * group * dim], j.out_stride = j.q_stride;
      j.n_tokens = tokens, j.group = group, j.pos0 = total - tokens, j.kv_head = h, j.window = total > 40 ? 24 : 0;
      j.scale = 1.f / std::sqrt((float)dim), j.decode = tokens == 1, j.table = table.data();
      each.attention(kv, j, scratch.p);
    }
  }
  where = std::string(k.name) + " attention type " + std::to_string((int)type) + " dim " + std::to_string(dim) + " total " +
          std::to_string(total) + " tokens " + std::to_string(tokens) + " pattern " + std::to_string(pattern);
  same("cache", stored[0], stored[1]);
  near("out", out[0], out[1], 1e-5);
}

static void check_attentions(const Kernels& k, const Kernels& oracle) {
  for (KvType type : {KvType::kF16, KvType::kBf16, KvType::kInt8, KvType::kFp8})
    for (int dim : {16, 64, 80})
      for (int total : {1, 17, 100})
        for (int tokens : {1, 5, 17})
          for (int pattern : {kRandom, kZeros, kSubnormal})
            if (tokens <= total) check_attention(k, oracle, type, dim, 1 + below(4), total, tokens, pattern);
}

int main() {
  const Kernels& oracle = *kernels_by_name("portable");
  int sets = 0;
  for (const char* name : {"avx512bf16", "avx512", "avx2", "neoni8mm", "neon"})
    if (const Kernels* k = kernels_by_name(name)) {
      const int before = checks;
      check_linears(*k, oracle), check_grams(*k, oracle), check_sweeps(*k, oracle), check_norms(*k, oracle);
      check_elementwise(*k, oracle), check_attentions(*k, oracle);
      std::printf("%s: %d comparisons with portable\n", name, checks - before);
      ++sets;
    }
  std::printf("best on this CPU: %s; %d instruction sets beside portable, %d failures\n", select_kernels()->name, sets, failures);
  return failures != 0;
}
