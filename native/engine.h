// The engine's part of the C ABI: plain structs that describe a decoder, and calls that run it.
#pragma once

#include "acttail.h"

#ifdef __cplusplus
extern "C" {
#endif

enum acttail_rule {
  ACTTAIL_DENSE = 0,
  ACTTAIL_TOPK = 1,       // the k entries of largest magnitude (times score_scale, if given)
  ACTTAIL_THRESHOLD = 2,  // the entries with |x| > threshold
};

// A weight matrix; see kernels.hpp for the layouts. format: 0 fp32, 1 bf16, 2 int8, 3 int4.
struct acttail_matrix {
  int32_t format;
  int32_t group;
  int64_t d_in;
  int64_t columns;
  const void* data;
  const uint16_t* scale;
  const uint16_t* minimum;
};

// One projection's outputs inside a fused matrix: columns begin .. end (multiples of 64).
struct acttail_segment {
  int64_t begin;
  int64_t end;
  int64_t k;
  const float* score_scale;  // [d_in] or null
  float threshold;
  int32_t rule;
  int32_t dense_kernel;  // read every row even though most of x is zeroed (faster at high density)
  int32_t padding;
};

// Projections that read one vector, side by side. More outputs come first in none: segments are in
// descending order of kept entries, so that a kept row is read from its start.
struct acttail_fused {
  struct acttail_matrix matrix;
  struct acttail_segment segment[3];
  const float* bias;  // [columns] or null
  int32_t segments;   // 0: the block has no such projection
  int32_t padding;
};

struct acttail_norm {
  const float* weight;  // [n]; null: no norm here
  const float* bias;    // [n] or null
};

struct acttail_block {
  struct acttail_fused qkv, o, gate_up, down;
  struct acttail_norm input_norm;           // before attention
  struct acttail_norm attention_norm;       // on the attention's output, before it is added
  struct acttail_norm mlp_norm;             // before the MLP
  struct acttail_norm output_norm;          // on the MLP's output, before it is added
  struct acttail_norm q_norm, k_norm;       // per head
  int64_t q_offset, k_offset, v_offset;     // columns of qkv
  int64_t gate_offset, up_offset;           // columns of gate_up; gate_offset < 0: no gate
  int64_t window;                           // positions a token sees, itself included; 0: all
  int32_t rope;                             // which rope table; -1: none
  int32_t padding;
};

struct acttail_rope {
  const float* inv_freq;  // [half]
  int64_t half;           // rotated pairs per head
  float scale;            // of cos and sin
  int32_t padding;
};

struct acttail_model {
  const struct acttail_block* block;
  const struct acttail_rope* rope;
  struct acttail_matrix embedding;  // output-major [vocabulary][hidden]
  struct acttail_matrix head;       // output-major [vocabulary][hidden]
  struct acttail_norm final_norm;
  int64_t blocks, ropes, hidden, heads, kv_heads, head_dim, intermediate, vocabulary;
  float norm_eps, attention_scale, attention_softcap, logit_softcap, embedding_scale;
  int32_t layer_norm;  // 1: LayerNorm instead of RMSNorm
  int32_t activation;  // 0 silu, 1 tanh-gelu, 2 erf-gelu, 3 relu
  int32_t kv_format;   // 0 fp32, 1 bf16, 2 int8
};

struct acttail_engine;
struct acttail_cache;

// The structs are copied; what they point to must outlive the engine. Null on bad arguments.
ACTTAIL_API struct acttail_engine* acttail_engine_new(const struct acttail_model* model, int threads);
ACTTAIL_API void acttail_engine_free(struct acttail_engine* engine);

// A KV cache of `capacity` positions; null when memory runs out.
ACTTAIL_API struct acttail_cache* acttail_cache_new(const struct acttail_engine* engine,
                                                    int64_t capacity);
ACTTAIL_API void acttail_cache_free(struct acttail_cache* cache);
ACTTAIL_API int64_t acttail_cache_length(const struct acttail_cache* cache);
ACTTAIL_API int64_t acttail_cache_bytes(const struct acttail_cache* cache);
// Forget all positions from `length` on.
ACTTAIL_API int acttail_cache_truncate(struct acttail_cache* cache, int64_t length);
// Store keys and values [count][kv_heads][head_dim] of one block at positions first .. first + count - 1.
ACTTAIL_API int acttail_cache_write(struct acttail_cache* cache, int64_t block, int64_t first,
                                    int64_t count, const float* keys, const float* values);
// Read them back.
ACTTAIL_API int acttail_cache_read(struct acttail_cache* cache, int64_t block, int64_t first,
                                   int64_t count, float* keys, float* values);
// Say how many positions hold data, after acttail_cache_write on every block.
ACTTAIL_API int acttail_cache_set_length(struct acttail_cache* cache, int64_t length);

// Run `count` tokens one after the other. logits is [count][vocabulary] if all_logits, else
// [vocabulary] of the last token. read, if not null, receives the number of weights that were read.
ACTTAIL_API int acttail_engine_forward(struct acttail_engine* engine, struct acttail_cache* cache,
                                       const int64_t* tokens, int64_t count, int all_logits,
                                       float* logits, double* read);

// Decode rows first .. last - 1 of an input-major matrix, columns begin .. end, to bfloat16 (or fp32)
// [last - first][end - begin].
ACTTAIL_API int acttail_decode_rows(const struct acttail_matrix* m, int64_t first, int64_t last,
                                    int64_t begin, int64_t end, int as_float, void* out, int threads);
// y[b][j] += sum over the kept rows; see kernels.hpp. x is [count][batch].
ACTTAIL_API int acttail_add_rows(const struct acttail_matrix* m, const int32_t* index, const float* x,
                                 int64_t count, int64_t begin, int64_t end, float* y, int64_t batch,
                                 int64_t stride);
// y[b] = W TopK(x[b]) for 1 to 8 vectors; x is [rows][d_in], y [rows][columns].
ACTTAIL_API int acttail_sparse_linear(const struct acttail_matrix* m, const float* x, int64_t rows,
                                      int64_t k, float* y, int threads);
// y = W x of an output-major matrix.
ACTTAIL_API int acttail_dot_rows(const struct acttail_matrix* m, const float* x, float* y);

#ifdef __cplusplus
}
#endif
