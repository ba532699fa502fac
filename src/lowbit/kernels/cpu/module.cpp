// The Python door. Tensors come as addresses (tensor.data_ptr()); Python checks shapes and keeps them alive. The GIL is
// released while anything is computed.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <nanobind/stl/optional.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>

#include "decoder.h"
#include "gram_threads.h"
#include "pack.h"

namespace nb = nanobind;
using namespace lowbit;
using Address = uintptr_t;

template <class T>
static T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

static const Kernels& named(const std::optional<std::string>& isa) {
  const Kernels* k = isa ? kernels_by_name(isa->c_str()) : select_kernels();
  if (!k) throw std::invalid_argument("this CPU or build has no kernels named " + *isa);
  return *k;
}

static Weight make_weight(int kind, int bits, int rows, int cols, int group, int n_groups, int fold, int zero,
                          int scale_type, Address codes, Address scales, Address zeros, Address table, Address bias) {
  Weight w;
  w.kind = (Kind)kind, w.bits = bits, w.rows = rows, w.cols = cols;
  w.panels = panels_of(w.kind, rows), w.blocks = (cols + kBlock - 1) / kBlock;
  w.group = group, w.n_groups = n_groups, w.fold = fold, w.segment = fold, w.zero = zero, w.scale_type = (ScaleType)scale_type;
  w.codes = at<uint8_t>(codes), w.scales = at<uint8_t>(scales), w.zeros = at<uint8_t>(zeros);
  w.table = at<uint8_t>(table), w.bias = at<float>(bias);
  if (w.kind != Kind::kBf16) {
    if (fold < kBlock || fold > kMaxFold || fold % kBlock || (w.blocks * kBlock) % fold)
      throw std::invalid_argument("fold must be a multiple of 32, at most 512, that divides the columns");
    while (w.segment * 2 <= kMaxFold && (w.blocks * kBlock) % (2 * w.segment) == 0 &&
           (group >= cols || group % (2 * w.segment) == 0))
      w.segment *= 2;
    if (kMaxFold % w.segment) throw std::invalid_argument("fold must be a power of two");
    if (group < cols && group % fold) throw std::invalid_argument("group must be a multiple of fold");
  }
  return w;
}

// out (m, rows) = x (m, cols) W^T: quantize the activations, then multiply. threads share rows, then panels.
static void linear(const Weight& w, Address x, int m, int act_group, Address out, std::optional<std::string> isa) {
  const Kernels& k = named(isa);
  const int wide = w.blocks * kBlock, folds = wide / w.fold, group = act_group > 0 ? act_group : wide;
  if (group < wide && group % w.fold) throw std::invalid_argument("act_group must be a multiple of the weight's fold");
  const auto team = Pool::shared();
  Pool& pool = *team;
  std::vector<int8_t> q((size_t)m * wide + 64);
  std::vector<float> scale((size_t)m * folds + 16);
  std::vector<int32_t> sum((size_t)m * folds + 16);
  std::vector<uint16_t> bf16(w.kind == Kind::kBf16 ? (size_t)m * wide : 0);
  const size_t each = (k.linear_scratch + (size_t)m * 128 + 127) / 64 * 64;
  std::vector<uint8_t> scratch(each * pool.size() + 64);
  uint8_t* base = scratch.data() + (64 - (uintptr_t)scratch.data() % 64) % 64;
  Act a;
  std::vector<float> f32(act_group < 0 ? (size_t)m * wide : 0);
  if (act_group < 0) a.f32 = f32.data();
  a.q = q.data(), a.scale = scale.data(), a.sum = sum.data(), a.bf16 = bf16.data(), a.stride = wide, a.fold = w.fold;
  const int height = k.tile_rows, tiled = (m > kFewRows && w.kind != Kind::kBf16) || w.kind == Kind::kLattice ? m + height : 0;
  std::vector<int8_t> tiles((size_t)tiled * wide);
  std::vector<float> tile_scale((size_t)tiled * folds);
  std::vector<int32_t> tile_sum((size_t)tiled * folds);
  a.tiles = tiles.data(), a.tile_scale = tile_scale.data(), a.tile_sum = tile_sum.data();
  pool.run([&](int t) {
    for (;;) {
      auto r = pool.next(t, m, height);
      if (r.begin >= r.end) break;
      for (int i = r.begin; i < r.end; ++i)
        if (act_group < 0)
          std::memcpy(&f32[(size_t)i * wide], at<float>(x) + (size_t)i * w.cols, (size_t)w.cols * 4);
        else
          k.norm_quant(at<float>(x) + (size_t)i * w.cols, nullptr, 0.f, w.cols, wide, w.fold, group,
                     w.kind == Kind::kBf16 ? nullptr : q.data() + (size_t)i * wide, scale.data() + (size_t)i * folds,
                     sum.data() + (size_t)i * folds, bf16.empty() ? nullptr : bf16.data() + (size_t)i * wide, nullptr);
      if (tiled) k.pack_tile(a, r.begin / height, r.end - r.begin);
    }
    pool.barrier();
    for (;;) {
      auto r = pool.next(t, w.panels, 4);
      if (r.begin >= r.end) break;
      k.linear(w, a, m, r.begin, r.end, at<float>(out), w.rows, false, base + each * t);
    }
  });
}

static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Bytes/s of the whole team reading [p, p + n), each thread its own contiguous part.
static double read_rate(Address p, size_t n, int pattern) {
  const Kernels& k = *select_kernels();
  const auto team = Pool::shared();
  Pool& pool = *team;
  std::vector<uint64_t> sink(pool.size() * 8);
  const size_t part = n / pool.size() / 4096 * 4096;
  const double t0 = seconds();
  pool.run([&](int t) { sink[8 * t] = k.read(at<uint8_t>(p) + part * t, part, pattern); });
  const double s = seconds() - t0;
  return (double)part * pool.size() / s + (sink[0] == 42 ? 1e-9 : 0);
}

static double int8_rate(size_t iterations) {
  const Kernels& k = *select_kernels();
  const auto team = Pool::shared();
  Pool& pool = *team;
  std::vector<uint64_t> sink(pool.size() * 8);
  const double t0 = seconds();
  pool.run([&](int t) { sink[8 * t] = k.ops_int8(iterations); });
  return (double)iterations * 12 * 128 * pool.size() / (seconds() - t0) + (sink[0] == 42 ? 1e-9 : 0);
}

using Nogil = nb::call_guard<nb::gil_scoped_release>;

static void bind_decoder(nb::module_& m) {
  nb::class_<Weight>(m, "Weight")
      .def_ro("rows", &Weight::rows)
      .def_ro("cols", &Weight::cols)
      .def_ro("bits", &Weight::bits)
      .def_ro("fold", &Weight::fold)
      .def_ro("group", &Weight::group);
#define FIELD(name) .def_rw(#name, &T::name)
  {
    using T = Layer;
    nb::class_<T>(m, "Layer").def(nb::init<>()) FIELD(qkv) FIELD(gate_up) FIELD(o) FIELD(down) FIELD(attn_norm)
        FIELD(mlp_norm) FIELD(post_attn_norm) FIELD(post_mlp_norm) FIELD(q_norm) FIELD(k_norm) FIELD(rope_cos)
            FIELD(rope_sin) FIELD(window) FIELD(kv) FIELD(k_scale) FIELD(v_scale) FIELD(hadamard_down);
  }
  {
    using T = Config;
    nb::class_<T>(m, "Config").def(nb::init<>()) FIELD(hidden) FIELD(inner) FIELD(heads) FIELD(kv_heads) FIELD(head_dim)
        FIELD(rotary) FIELD(vocab) FIELD(max_tokens) FIELD(max_position) FIELD(activation) FIELD(act_group) FIELD(eps)
            FIELD(embed_scale) FIELD(attn_scale) FIELD(attn_softcap) FIELD(logit_softcap) FIELD(embedding)
                FIELD(embedding_type) FIELD(embedding_scale) FIELD(final_norm) FIELD(head) FIELD(kv_type) FIELD(kv_block) FIELD(kv_blocks) FIELD(kv_fixed)
                    FIELD(layers);
  }
#undef FIELD
  nb::class_<Decoder>(m, "Decoder")
      .def("__init__",
           [](Decoder* d, const Config& c, std::optional<std::string> isa) {
             new (d) Decoder(c, isa ? isa->c_str() : nullptr);
           },
           nb::arg("config"), nb::arg("isa") = nb::none())
      .def("forward",
           [](Decoder& d, Address tokens, int n, Address seqs, int n_seqs, Address tables, int stride, bool every,
              Address logits, Address next) {
             d.forward(at<int32_t>(tokens), n, at<Sequence>(seqs), n_seqs, at<int32_t>(tables), stride, every,
                       at<float>(logits), at<int32_t>(next));
           },
           nb::arg("tokens"), nb::arg("n"), nb::arg("seqs"), nb::arg("n_seqs"), nb::arg("tables"), nb::arg("table_stride"),
           nb::arg("every"), nb::arg("logits"), nb::arg("next"), Nogil());
  m.def("kv_block_bytes", [](int type, int heads, int dim, int block) {
    return kv_tile_bytes((KvType)type, dim) * heads * (block / 16);
  });
}

NB_MODULE(_cpu, m) {
  m.doc() = "lowbit's CPU kernels; see kernels.h for layouts";
  m.def("isa", [] { return std::string(select_kernels()->name); });
  m.def("isas", [] {
    std::vector<std::string> v;
    for (const char* n : {"avx512bf16", "avx512", "avx2", "neoni8mm", "neon", "portable"})
      if (kernels_by_name(n)) v.push_back(n);
    return v;
  });
  m.def("threads", [] { return Pool::shared()->size(); });
  m.def("set_threads", &Pool::set_threads);
  m.def("packed_bytes", [](int kind, int bits, int rows, int cols) { return packed_bytes((Kind)kind, bits, rows, cols); });
  m.def("pack_int", [](Address c, int bits, int rows, int cols, int pad, Address out) {
    pack_int(at<uint8_t>(c), bits, rows, cols, (uint8_t)pad, at<uint8_t>(out));
  }, Nogil());
  m.def("pack_table", [](Address c, int rows, int cols, Address out) {
    pack_table(at<uint8_t>(c), rows, cols, at<uint8_t>(out));
  }, Nogil());
  m.def("pack_bf16", [](Address c, int rows, int cols, Address out) {
    pack_bf16(at<uint16_t>(c), rows, cols, at<uint16_t>(out));
  }, Nogil());
  m.def("pack_side", [](Address c, int rows, int groups, int size, Address out) {
    pack_side(at<uint8_t>(c), rows, groups, size, at<uint8_t>(out));
  }, Nogil());
  m.def("advise_huge", [](Address p, size_t n) { advise_huge(at<void>(p), n); });
  m.def("read_rate", &read_rate, Nogil());
  m.def("int8_rate", &int8_rate, Nogil());
  m.def("weight", &make_weight, nb::arg("kind"), nb::arg("bits"), nb::arg("rows"), nb::arg("cols"), nb::arg("group"),
        nb::arg("n_groups"), nb::arg("fold"), nb::arg("zero"), nb::arg("scale_type"), nb::arg("codes"), nb::arg("scales"),
        nb::arg("zeros") = 0, nb::arg("table") = 0, nb::arg("bias") = 0);
  bind_decoder(m);
  m.def("linear", &linear, nb::arg("weight"), nb::arg("x"), nb::arg("m"), nb::arg("act_group"), nb::arg("out"),
        nb::arg("isa") = nb::none(), Nogil());
  // x (m, n) -> codes (m, stride), scales and sums (m, stride / fold); any of q, y may be 0.
  m.def("norm_quant", [](Address x, Address weight, float eps, int rows, int n, int stride, int fold, int group, Address q,
                         Address scale, Address sum, Address y, std::optional<std::string> isa) {
    const Kernels& k = named(isa);
    for (int i = 0; i < rows; ++i)
      k.norm_quant(at<float>(x) + (size_t)i * n, at<float>(weight), eps, n, stride, fold, group,
                   q ? at<int8_t>(q) + (size_t)i * stride : nullptr,
                   scale ? at<float>(scale) + (size_t)i * (stride / fold) : nullptr,
                   sum ? at<int32_t>(sum) + (size_t)i * (stride / fold) : nullptr, nullptr,
                   y ? at<float>(y) + (size_t)i * n : nullptr);
  }, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("rows"), nb::arg("n"), nb::arg("stride"), nb::arg("fold"),
        nb::arg("group"), nb::arg("q"), nb::arg("scale"), nb::arg("sum"), nb::arg("y"), nb::arg("isa") = nb::none(), Nogil());
  m.def("glu", [](Address g, Address u, Address h, int rows, int n, int act, std::optional<std::string> isa) {
    const Kernels& k = named(isa);
    for (int i = 0; i < rows; ++i)
      k.glu(at<float>(g) + (size_t)i * n, at<float>(u) + (size_t)i * n, at<float>(h) + (size_t)i * n, n, act);
  }, nb::arg("gate"), nb::arg("up"), nb::arg("out"), nb::arg("rows"), nb::arg("n"), nb::arg("act"),
        nb::arg("isa") = nb::none(), Nogil());
  m.def("rope", [](Address x, Address pos, int tokens, int heads, int dim, int rot, Address cos, Address sin,
                   std::optional<std::string> isa) {
    const Kernels& k = named(isa);
    for (int t = 0; t < tokens; ++t)
      for (int h = 0; h < heads; ++h)
        k.rope(at<float>(x) + ((size_t)t * heads + h) * dim, dim, rot, at<float>(cos) + (size_t)at<int32_t>(pos)[t] * (rot / 2),
               at<float>(sin) + (size_t)at<int32_t>(pos)[t] * (rot / 2));
  }, nb::arg("x"), nb::arg("positions"), nb::arg("tokens"), nb::arg("heads"), nb::arg("dim"), nb::arg("rotary"),
        nb::arg("cos"), nb::arg("sin"), nb::arg("isa") = nb::none(), Nogil());
  m.def("gram", [](Address x, int rows, int width, Address sum, int threads, std::optional<std::string> isa) {
    add_gram(named(isa), at<uint16_t>(x), rows, width, at<float>(sum), threads);
  }, nb::arg("x"), nb::arg("rows"), nb::arg("width"), nb::arg("sum"), nb::arg("threads"), nb::arg("isa") = nb::none(),
        Nogil());
  m.def("quadratic_forms", [](Address x, int rows, int width, std::vector<Address> matrices, int threads,
                              std::optional<std::string> isa) {
    std::vector<const float*> each;
    for (Address a : matrices) each.push_back(at<float>(a));
    return quadratic_forms(named(isa), at<uint16_t>(x), rows, width, each, threads);
  }, nb::arg("x"), nb::arg("rows"), nb::arg("width"), nb::arg("matrices"), nb::arg("threads"), nb::arg("isa") = nb::none(),
        Nogil());
  // what: 0 descent, 1 the errors of every scale
  m.def("sweep", [](int what, int kind, Address x, Address value, int columns, int out, Address matrix, Address scale,
                    int scales, Address zero, Address index, Address table, int entries, float lowest, float highest,
                    std::optional<std::string> isa) {
    const Kernels& k = named(isa);
    Sweep s;
    s.columns = columns, s.out = out, s.scales = scales, s.entries = entries, s.kind = (Grid)kind;
    s.x = at<float>(x), s.value = at<float>(value), s.matrix = at<float>(matrix), s.scale = at<float>(scale);
    s.zero = at<float>(zero), s.index = at<int32_t>(index), s.table = at<float>(table);
    s.lowest = lowest, s.highest = highest;
    std::vector<uint8_t> scratch((what == 1 ? k.errors_scratch(s) : k.sweep_scratch(s)) + 64);
    (what == 1 ? k.grid_errors : k.sweep)(s, scratch.data() + (64 - (uintptr_t)scratch.data() % 64) % 64);
  }, nb::arg("what"), nb::arg("kind"), nb::arg("x"), nb::arg("value"), nb::arg("columns"), nb::arg("out"),
        nb::arg("matrix"), nb::arg("scale"), nb::arg("scales"), nb::arg("zero"), nb::arg("index"), nb::arg("table"),
        nb::arg("entries"), nb::arg("lowest"), nb::arg("highest"), nb::arg("isa") = nb::none(), Nogil());
  m.def("hadamard", [](Address x, int rows, int n, float scale, std::optional<std::string> isa) {
    const Kernels& k = named(isa);
    for (int i = 0; i < rows; ++i) k.hadamard(at<float>(x) + (size_t)i * n, n, scale);
  }, nb::arg("x"), nb::arg("rows"), nb::arg("n"), nb::arg("scale"), nb::arg("isa") = nb::none(), Nogil());
  // Store k, v (tokens, kv_heads, dim) at pos0.. of one sequence's cache, then attend with q (tokens, heads, dim).
  m.def("attention", [](Address q, Address kk, Address v, int tokens, int heads, int kv_heads, int dim, int pos0, int type,
                        int block, Address cache, Address table, float scale, float softcap, int window, bool decode, bool fixed,
                        Address out, std::optional<std::string> isa) {
    const Kernels& k = named(isa);
    Kv kv;
    kv.type = (KvType)type, kv.heads = kv_heads, kv.dim = dim, kv.block = block, kv.base = at<uint8_t>(cache), kv.fixed = fixed;
    kv.tile_bytes = kv_tile_bytes(kv.type, dim), kv.block_bytes = kv.tile_bytes * kv_heads * (block / 16);
    for (int t = 0; t < tokens; ++t)
      for (int h = 0; h < kv_heads; ++h)
        k.kv_store(kv, at<float>(kk) + ((size_t)t * kv_heads + h) * dim, at<float>(v) + ((size_t)t * kv_heads + h) * dim, h,
                   at<int32_t>(table)[(pos0 + t) / block], (pos0 + t) % block);
    if (!out) return;
    const auto team = Pool::shared();
  Pool& pool = *team;
    const size_t each = (k.attention_scratch(dim, heads / kv_heads) + 127) / 64 * 64;
    std::vector<uint8_t> scratch(each * pool.size() + 64);
    uint8_t* base = scratch.data() + (64 - (uintptr_t)scratch.data() % 64) % 64;
    pool.run([&](int t) {
      for (;;) {
        auto r = pool.next(t, kv_heads, 1);
        if (r.begin >= r.end) return;
        AttnJob j;
        j.group = heads / kv_heads;
        j.q = at<float>(q) + (size_t)r.begin * j.group * dim, j.q_stride = (size_t)heads * dim;
        j.out = at<float>(out) + (size_t)r.begin * j.group * dim, j.out_stride = (size_t)heads * dim;
        j.n_tokens = tokens, j.pos0 = pos0, j.kv_head = r.begin, j.window = window, j.scale = scale, j.softcap = softcap;
        j.decode = decode, j.table = at<int32_t>(table);
        k.attention(kv, j, base + each * t);
      }
    });
  }, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("tokens"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("dim"),
        nb::arg("pos0"), nb::arg("kv_type"), nb::arg("block"), nb::arg("cache"), nb::arg("table"), nb::arg("scale"),
        nb::arg("softcap"), nb::arg("window"), nb::arg("decode"), nb::arg("fixed"), nb::arg("out"), nb::arg("isa") = nb::none(), Nogil());
}
