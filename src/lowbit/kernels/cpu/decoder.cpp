// See decoder.h. Every phase ends in a barrier; what a phase reads was finished before it.
#include "decoder.h"

#include <algorithm>
#include <stdexcept>

#include "pack.h"

namespace lowbit {

static int up32(int n) { return (n + kBlock - 1) / kBlock * kBlock; }
static const float* f32(uintptr_t p) { return reinterpret_cast<const float*>(p); }

size_t kv_tile_bytes(KvType type, int dim) {
  if (type == KvType::kInt4) return 16 * (size_t)dim + 2 * ((dim + kKvGroup - 1) / kKvGroup) * 2 * 16 * sizeof(uint16_t);
  const size_t one = type <= KvType::kBf16 ? 2 : 1;
  return 2 * 16 * (size_t)dim * one + (type == KvType::kInt8 ? 2 * 16 * sizeof(float) : 0);
}

struct Decoder::Call {
  int n;
  const Sequence* seqs;
  int n_seqs;
  const int32_t* tables;
  int table_stride;
  const int32_t* seq_of;
};

static void check_weight(const Weight& w, int rows, int cols, const char* what) {
  auto fail = [&](const std::string& s) { throw std::invalid_argument(std::string(what) + ": " + s); };
  if (w.rows != rows || w.cols != cols)
    fail("expected a weight of " + std::to_string(rows) + " x " + std::to_string(cols) + ", got " +
         std::to_string(w.rows) + " x " + std::to_string(w.cols));
  if (!w.codes) fail("no codes");
}

Decoder::Decoder(Config config, const char* isa)
    : cfg_(std::move(config)), k_(isa ? kernels_by_name(isa) : select_kernels()), team_(Pool::shared()), pool_(*team_) {
  if (!k_) throw std::invalid_argument("this CPU or build has no kernels of that name");
  const Config& c = cfg_;
  if (c.head_dim % 16 || c.head_dim < 16) throw std::invalid_argument("head_dim must be a multiple of 16");
  if (c.kv_heads < 1 || c.heads % c.kv_heads || c.heads / c.kv_heads > 32)
    throw std::invalid_argument("heads must be a multiple of kv_heads, at most 32 times as many");
  if (c.kv_block < 16 || c.kv_block % 16) throw std::invalid_argument("kv_block must be a multiple of 16");
  const int qd = c.heads * c.head_dim, kd = c.kv_heads * c.head_dim;
  for (const Layer& l : c.layers) {
    int r = 0, g = 0;
    for (const Weight& w : l.qkv) check_weight(w, w.rows, c.hidden, "qkv"), r += w.rows;
    for (const Weight& w : l.gate_up) check_weight(w, w.rows, c.hidden, "gate_up"), g += w.rows;
    if (r != qd + 2 * kd) throw std::invalid_argument("qkv parts do not add up to heads x head_dim");
    if (g != 2 * c.inner) throw std::invalid_argument("gate_up parts do not add up to 2 x inner");
    for (const auto* parts : {&l.qkv, &l.gate_up})
      for (const Weight& w : *parts) lattice_ |= w.kind == Kind::kLattice;
    lattice_ |= l.o.kind == Kind::kLattice || l.down.kind == Kind::kLattice;
    check_weight(l.o, c.hidden, qd, "o_proj");
    check_weight(l.down, c.hidden, c.inner, "down_proj");
  }
  check_weight(c.head, c.vocab, c.hidden, "lm_head");
  // One arena for everything a call needs.
  const size_t m = c.max_tokens, wide = up32(std::max({c.hidden, c.inner, qd})) + 64;
  size_t at = 0;
  auto take = [&](size_t bytes) { size_t o = at; at += (bytes + 127) / 64 * 64; return o; };
  const size_t x = take(m * c.hidden * 4), qkv = take(m * (qd + 2 * kd) * 4), attn = take(m * qd * 4),
               gu = take(m * std::max(2 * c.inner, c.hidden) * 4), h = take(m * std::max(c.inner, c.hidden) * 4), q = take(m * wide), s = take(m * wide / 8),
               u = take(m * wide / 8), b = take(m * wide * 2),
               f = take(c.act_group < 0 ? m * wide * 4 : 0);
  const size_t tiled = m + k_->tile_rows, t = take(tiled * wide), ts = take(tiled * wide / 8), tu = take(tiled * wide / 8);
  const size_t scratch = k_->linear_scratch + 64 * 128 + m * 128 + k_->attention_scratch(c.head_dim, c.heads / c.kv_heads);
  std::vector<size_t> per(pool_.size());
  for (auto& p : per) p = take(scratch);
  const size_t lg = take((size_t)32 * c.vocab * 4);
  arena_.resize(at + 64);
  uint8_t* base = arena_.data() + (64 - (uintptr_t)arena_.data() % 64) % 64;
  x_ = (float*)(base + x), qkv_ = (float*)(base + qkv), attn_ = (float*)(base + attn), gu_ = (float*)(base + gu);
  h_ = (float*)(base + h), q_ = (int8_t*)(base + q), scale_ = (float*)(base + s), sum_ = (int32_t*)(base + u);
  tiles_ = (int8_t*)(base + t), tile_scale_ = (float*)(base + ts), tile_sum_ = (int32_t*)(base + tu);
  bf16_ = (uint16_t*)(base + b), f32_ = (float*)(base + f), logits_ = (float*)(base + lg);
  for (size_t p : per) scratch_.push_back(base + p);
}

template <class F>
void Decoder::each(int thread, int n, int grain, F f) {
  for (;;) {
    auto r = pool_.next(thread, n, grain);
    if (r.begin >= r.end) break;
    for (int i = r.begin; i < r.end; ++i) f(i);
  }
  pool_.barrier();
}

Act Decoder::act(const Weight& w) const {
  Act a;
  a.q = q_, a.scale = scale_, a.sum = sum_, a.bf16 = bf16_, a.stride = up32(w.cols), a.fold = w.fold;
  a.tiles = tiles_, a.tile_scale = tile_scale_, a.tile_sum = tile_sum_;
  if (cfg_.act_group < 0) a.f32 = f32_;
  return a;
}

// Rows of x -> (norm) -> int8 groups, bf16, or both: whatever the weights that follow want.
void Decoder::quantize(int thread, const Call&, int rows, const float* x, size_t stride, const float* norm,
                       const Weight& w, bool bf16) {
  const int n = w.cols, wide = up32(n), folds = wide / w.fold, group = cfg_.act_group ? cfg_.act_group : n;
  if (cfg_.act_group < 0) {
    each(thread, rows, 1, [&](int r) {
      float* y = f32_ + (size_t)r * wide;
      k_->norm_quant(x + (size_t)r * stride, norm, cfg_.eps, n, wide, 32, 32, nullptr, nullptr, nullptr, nullptr, y);
      std::fill(y + n, y + wide, 0.f);
    });
    return;
  }
  const bool ints = w.kind != Kind::kBf16;
  // Without a norm and with small groups even one row can be shared out.
  const int piece = !norm && group < 512 && 512 % group == 0 && 512 % w.fold == 0 && rows < 4 ? 512 : wide;
  const int pieces = (wide + piece - 1) / piece;
  auto one = [&](int i) {
    const int r = i / pieces, at = i % pieces * piece;
    const int len = std::min(piece, wide - at), valid = std::min(n - at, len);
    k_->norm_quant(x + (size_t)r * stride + at, norm, cfg_.eps, valid, len, w.fold, group >= n ? wide : group,
                   ints ? q_ + (size_t)r * wide + at : nullptr, scale_ + (size_t)r * folds + at / w.fold,
                   sum_ + (size_t)r * folds + at / w.fold, bf16 ? bf16_ + (size_t)r * wide + at : nullptr, nullptr);
  };
  if (!ints || (rows <= kFewRows && !lattice_)) return each(thread, rows * pieces, 1, one);
  const int height = k_->tile_rows;
  each(thread, (rows + height - 1) / height, 1, [&](int tile) {
    const int first = tile * height, end = std::min(rows, first + height);
    for (int i = first * pieces; i < end * pieces; ++i) one(i);
    k_->pack_tile(act(w), tile, end - first);
  });
}

void Decoder::linear(int thread, const Weight* parts, int n_parts, int rows, float* out, size_t ldo, bool add) {
  int most = 0;
  for (int i = 0; i < n_parts; ++i) most += parts[i].panels;
  const size_t panel_bytes = packed_bytes(parts[0].kind, parts[0].bits, kPanel, parts[0].cols);
  // Asking for the next chunk is an atomic operation, which waits for all loads under way: few large chunks, then.
  int grain = rows <= 8 ? (int)((1 << 20) / panel_bytes) : 4;
  grain = std::max(2, std::min(grain, most / (2 * pool_.size())) / 2 * 2);
  int chunks = 0;
  for (int i = 0; i < n_parts; ++i) chunks += (parts[i].panels + grain - 1) / grain;
  each(thread, chunks, 1, [&](int chunk) {
    float* o = out;
    for (int i = 0; i < n_parts; ++i) {
      const Weight& w = parts[i];
      const int mine = (w.panels + grain - 1) / grain;
      if (chunk < mine) {
        k_->linear(w, act(w), rows, chunk * grain, std::min(w.panels, (chunk + 1) * grain), o, ldo, add,
                   scratch_[thread]);
        return;
      }
      chunk -= mine;
      o += w.rows;
    }
  });
}

static bool any_bf16(const Weight* w, int n) {
  return std::any_of(w, w + n, [](const Weight& x) { return x.kind == Kind::kBf16; });
}
// The part whose kind decides how to quantize: an integer one if there is one.
static const Weight& lead(const std::vector<Weight>& parts) {
  for (const Weight& w : parts)
    if (w.kind != Kind::kBf16) return w;
  return parts[0];
}

void Decoder::layer(int thread, const Layer& l, const Call& c) {
  const Config& g = cfg_;
  const int n = c.n, dim = g.head_dim, qd = g.heads * dim, kd = g.kv_heads * dim, row = qd + 2 * kd;
  const int group = g.heads / g.kv_heads;
  Kv kv;
  kv.type = (KvType)g.kv_type, kv.heads = g.kv_heads, kv.dim = dim, kv.block = g.kv_block;
  kv.base = reinterpret_cast<uint8_t*>(l.kv), kv.fixed = g.kv_fixed;
  const float *k_scale = f32(l.k_scale), *v_scale = f32(l.v_scale);
  kv.tile_bytes = kv_tile_bytes(kv.type, dim);
  kv.block_bytes = kv.tile_bytes * g.kv_heads * (g.kv_block / 16);

  quantize(thread, c, n, x_, g.hidden, f32(l.attn_norm), lead(l.qkv), any_bf16(l.qkv.data(), (int)l.qkv.size()));
  linear(thread, l.qkv.data(), (int)l.qkv.size(), n, qkv_, row, false);

  // Rotate queries and keys, put keys and values into the cache.
  each(thread, n * g.kv_heads, n > 8 ? 16 : 1, [&](int i) {
    const int t = i / g.kv_heads, head = i % g.kv_heads;
    const int s = c.seq_of[t], pos = c.seqs[s].pos0 + t - c.seqs[s].start;
    float* base = qkv_ + (size_t)t * row;
    const float *cos = f32(l.rope_cos) + (size_t)pos * (g.rotary / 2), *sin = f32(l.rope_sin) + (size_t)pos * (g.rotary / 2);
    float* k = base + qd + head * dim;
    for (int j = -1; j < group; ++j) {
      float* p = j < 0 ? k : base + (size_t)(head * group + j) * dim;
      const float* norm = f32(j < 0 ? l.k_norm : l.q_norm);
      if (norm) k_->norm_quant(p, norm, g.eps, dim, dim, 32, 32, nullptr, nullptr, nullptr, nullptr, p);
      k_->rope(p, dim, g.rotary, cos, sin);
      // (q s) . (k / s) is the same score, and k / s fits the cache's grid better.
      for (int i = 0; k_scale && i < dim; ++i) p[i] = j < 0 ? p[i] / k_scale[head * dim + i] : p[i] * k_scale[head * dim + i];
    }
    float* v = base + qd + kd + head * dim;
    for (int i = 0; v_scale && i < dim; ++i) v[i] /= v_scale[head * dim + i];
    const int block = c.tables[(size_t)s * c.table_stride + pos / g.kv_block];
    k_->kv_store(kv, k, v, head, block, pos % g.kv_block);
  });

  each(thread, (int)items_.size(), 1, [&](int i) {
    const Item& it = items_[i];
    const Sequence& s = c.seqs[it.seq];
    AttnJob job;
    const size_t t = s.start + it.token0;
    job.q = qkv_ + t * row + (size_t)it.head * group * dim;
    job.q_stride = row;
    job.out = attn_ + t * qd + (size_t)it.head * group * dim;
    job.out_stride = qd;
    job.n_tokens = it.tokens, job.group = group, job.pos0 = s.pos0 + it.token0, job.kv_head = it.head;
    job.window = l.window, job.scale = g.attn_scale, job.softcap = g.attn_softcap, job.decode = s.decode != 0;
    job.table = c.tables + (size_t)it.seq * c.table_stride;
    k_->attention(kv, job, scratch_[thread]);
    for (int r = 0; v_scale && r < it.tokens * group; ++r) {
      float* out = job.out + (size_t)(r / group) * qd + (size_t)(r % group) * dim;
      for (int i = 0; i < dim; ++i) out[i] *= v_scale[it.head * dim + i];
    }
  });

  // A branch is added to the residual stream by the product itself, unless a norm stands between.
  auto branch = [&](const Weight& w, uintptr_t post) {
    if (!post) return linear(thread, &w, 1, n, x_, g.hidden, true);
    linear(thread, &w, 1, n, h_, g.hidden, false);
    each(thread, n, 1, [&](int t) {
      float *y = h_ + (size_t)t * g.hidden, *x = x_ + (size_t)t * g.hidden;
      k_->norm_quant(y, f32(post), g.eps, g.hidden, up32(g.hidden), 32, 32, nullptr, nullptr, nullptr, nullptr, y);
      for (int i = 0; i < g.hidden; ++i) x[i] += y[i];
    });
  };
  quantize(thread, c, n, attn_, qd, nullptr, l.o, l.o.kind == Kind::kBf16);
  branch(l.o, l.post_attn_norm);

  quantize(thread, c, n, x_, g.hidden, f32(l.mlp_norm), lead(l.gate_up), any_bf16(l.gate_up.data(), (int)l.gate_up.size()));
  linear(thread, l.gate_up.data(), (int)l.gate_up.size(), n, gu_, 2 * (size_t)g.inner, false);
  const int piece = l.hadamard_down ? g.inner : 512, pieces = (g.inner + piece - 1) / piece;
  each(thread, n * pieces, n > 8 ? 4 : 1, [&](int i) {
    const int t = i / pieces, at = i % pieces * piece;
    const float* gate = gu_ + (size_t)t * 2 * g.inner + at;
    float* h = h_ + (size_t)t * g.inner + at;
    k_->glu(gate, gate + g.inner, h, std::min(piece, g.inner - at), g.activation);
    if (l.hadamard_down) k_->hadamard(h, g.inner, 1.f / __builtin_sqrtf((float)(g.inner & -g.inner)));
  });
  quantize(thread, c, n, h_, g.inner, nullptr, l.down, l.down.kind == Kind::kBf16);
  branch(l.down, l.post_mlp_norm);
}

void Decoder::check(const int32_t* tokens, int n, const Sequence* seqs, int n_seqs, const int32_t* tables,
                    int table_stride) const {
  const Config& g = cfg_;
  if (n < 1 || n > g.max_tokens)
    throw std::invalid_argument("a call takes 1 to " + std::to_string(g.max_tokens) + " tokens, got " + std::to_string(n));
  for (int i = 0; i < n; ++i)
    if (tokens[i] < 0 || tokens[i] >= g.vocab)
      throw std::invalid_argument("token " + std::to_string(tokens[i]) + " is outside the vocabulary of " +
                                  std::to_string(g.vocab));
  int at = 0;
  for (int s = 0; s < n_seqs; ++s) {
    const Sequence& q = seqs[s];
    if (q.start != at || q.len < 1 || q.pos0 < 0) throw std::invalid_argument("sequences must cover the tokens in order");
    at += q.len;
    const int end = q.pos0 + q.len;
    if (end > g.max_position)
      throw std::invalid_argument("position " + std::to_string(end - 1) + " is past the context of " +
                                  std::to_string(g.max_position));
    if (q.decode && q.len != 1) throw std::invalid_argument("decoding takes one token of a sequence");
    const int blocks = (end + g.kv_block - 1) / g.kv_block;
    if (blocks > table_stride) throw std::invalid_argument("the block table is too short");
    for (int b = 0; b < blocks; ++b)
      if (tables[(size_t)s * table_stride + b] < 0 || tables[(size_t)s * table_stride + b] >= g.kv_blocks)
        throw std::invalid_argument("the block table names a block that does not exist");
  }
  if (at != n) throw std::invalid_argument("sequences must cover all tokens");
}

void Decoder::forward(const int32_t* tokens, int n, const Sequence* seqs, int n_seqs, const int32_t* tables,
                      int table_stride, bool every, float* logits, int32_t* next) {
  check(tokens, n, seqs, n_seqs, tables, table_stride);
  const Config& g = cfg_;
  std::vector<int32_t> seq_of(n), rows;
  items_.clear();
  const int step = std::max(1, 32 / (g.heads / g.kv_heads));
  for (int s = 0; s < n_seqs; ++s) {
    for (int t = 0; t < seqs[s].len; ++t) {
      seq_of[seqs[s].start + t] = s;
      if (every || t + 1 == seqs[s].len) rows.push_back(seqs[s].start + t);
    }
    // Late blocks of a causal prompt cost most; they go first so that threads end together.
    for (int t = (seqs[s].len - 1) / step * step; t >= 0; t -= step)
      for (int h = 0; h < g.kv_heads; ++h) items_.push_back({s, t, std::min(step, seqs[s].len - t), h});
  }
  const Call c{n, seqs, n_seqs, tables, table_stride, seq_of.data()};
  const size_t esize = g.embedding_type == 0 ? 4 : g.embedding_type == 3 ? 1 : 2;
  const float* escale = f32(g.embedding_scale);
  const int n_rows = (int)rows.size();
  pool_.run([&](int thread) {
    each(thread, n, 1, [&](int t) {
      k_->rows_to_float(reinterpret_cast<const uint8_t*>(g.embedding) + (size_t)tokens[t] * g.hidden * esize,
                        g.embedding_type, x_ + (size_t)t * g.hidden, g.hidden,
                        escale ? escale[tokens[t]] * g.embed_scale : g.embed_scale);
    });
    for (const Layer& l : cfg_.layers) layer(thread, l, c);
    if (!logits && !next) return;
    // The head, 32 rows at a time when there is nowhere else to put logits. h_ collects the rows wanted.
    each(thread, n_rows, 1, [&](int r) {
      std::copy_n(x_ + (size_t)rows[r] * g.hidden, g.hidden, gu_ + (size_t)r * g.hidden);
    });
    for (int r = 0; r < n_rows; r += 32) {
      const int m = std::min(32, n_rows - r);
      float* out = logits ? logits + (size_t)r * g.vocab : logits_;
      quantize(thread, c, m, gu_ + (size_t)r * g.hidden, g.hidden, f32(g.final_norm), g.head, g.head.kind == Kind::kBf16);
      linear(thread, &g.head, 1, m, out, g.vocab, false);
      each(thread, m, 1, [&](int i) {
        float* y = out + (size_t)i * g.vocab;
        if (g.logit_softcap > 0.f) k_->softcap(y, g.vocab, g.logit_softcap);
        if (next) next[r + i] = k_->argmax(y, g.vocab);
      });
    }
  });
}

}  // namespace lowbit
