// A whole decoder in one call: embeddings, every layer, head, argmax, for any mix of sequences.
//
// The residual stream is float. Tokens of a call are ragged: each sequence brings `len` new tokens that start at its
// position `pos0`; 1 token is decoding, many are a prefill chunk, and both may share a call. Linears run over all
// tokens at once, attention per sequence through its block table. Nothing is allocated during a call.
//
// The weights, norms, tables and cache belong to the caller (Python tensors) and must outlive the decoder.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace lowbit {

struct Layer {
  // Linears that read the same vector; each part writes its rows after the former's. Same fold in a group.
  std::vector<Weight> qkv, gate_up;
  Weight o, down;
  uintptr_t attn_norm = 0, mlp_norm = 0;            // float, hidden
  uintptr_t post_attn_norm = 0, post_mlp_norm = 0;  // Gemma 2 and 3: norm of the branch before it is added
  uintptr_t q_norm = 0, k_norm = 0;                 // Qwen3, Gemma 3: per head, float, head_dim
  uintptr_t rope_cos = 0, rope_sin = 0;             // float, max_position x rotary / 2
  int window = 0;                                   // 0: sees everything before
  uintptr_t kv = 0;                                 // this layer's cache
  uintptr_t k_scale = 0, v_scale = 0;               // float, kv_heads x head_dim: what keys and values are divided by
  bool hadamard_down = false;                       // rotate the input of down_proj
};

struct Config {
  int hidden = 0, inner = 0, heads = 0, kv_heads = 0, head_dim = 0, rotary = 0, vocab = 0;
  int max_tokens = 512, max_position = 0;
  int activation = 0;             // 0 silu, 1 gelu tanh
  int act_group = 0;              // columns per int8 activation scale; 0: a whole token; -1: float activations
  float eps = 1e-5f, embed_scale = 1.f, attn_scale = 0.f, attn_softcap = 0.f, logit_softcap = 0.f;
  uintptr_t embedding = 0;        // vocab x hidden
  int embedding_type = 1;         // 0 float, 1 bf16, 2 fp16, 3 bytes (code + 128)
  uintptr_t embedding_scale = 0;  // type 3: float of each row
  uintptr_t final_norm = 0;
  Weight head;
  int kv_type = 0, kv_block = 32, kv_blocks = 0;
  bool kv_fixed = false;          // integers of the cache have no scales of their own: k_scale, v_scale are all
  std::vector<Layer> layers;
};

struct Sequence {
  int32_t start, len, pos0, decode;
};

size_t kv_tile_bytes(KvType type, int dim);

class Decoder {
 public:
  explicit Decoder(Config config, const char* isa = nullptr);
  // logits: (rows, vocab) float or null; next: (rows,) argmax or null; rows = sequences, or all tokens if `every`.
  void forward(const int32_t* tokens, int n, const Sequence* seqs, int n_seqs, const int32_t* tables, int table_stride,
               bool every, float* logits, int32_t* next);
  const Kernels& kernels() const { return *k_; }

 private:
  struct Call;
  void layer(int thread, const Layer& l, const Call& c);
  void quantize(int thread, const Call& c, int rows, const float* x, size_t stride, const float* norm, const Weight& w,
                bool bf16);
  void linear(int thread, const Weight* parts, int n_parts, int rows, float* out, size_t ldo, bool add);
  void check(const int32_t* tokens, int n, const Sequence* seqs, int n_seqs, const int32_t* tables, int table_stride) const;
  Act act(const Weight& w) const;
  template <class F>
  void each(int thread, int n, int grain, F f);

  Config cfg_;
  const Kernels* k_;
  std::shared_ptr<Pool> team_;
  Pool& pool_;
  bool lattice_ = false;  // whether some weight is on the lattice, whose products want tiles of activations
  std::vector<uint8_t> arena_;
  float *x_, *qkv_, *attn_, *gu_, *h_, *logits_, *f32_;
  int8_t *q_, *tiles_;
  float *scale_, *tile_scale_;
  int32_t *sum_, *tile_sum_;
  uint16_t* bf16_;
  std::vector<uint8_t*> scratch_;
  struct Item {
    int seq, token0, tokens, head;
  };
  std::vector<Item> items_;
};

}  // namespace lowbit
