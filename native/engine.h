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

// Of acttail_matrix.together.
#define ACTTAIL_NEVER 1073741824

enum acttail_activation {
  ACTTAIL_SILU = 0,
  ACTTAIL_GELU_TANH = 1,
  ACTTAIL_GELU_ERF = 2,
  ACTTAIL_RELU = 3,
};

// A weight matrix. Input-major: row i holds the weights that input i meets, one per output. Output-major: row
// j holds the weights of output j, one per input. Scales and minima are IEEE halves: [ceil(rows / group)]
// [columns] of an input-major matrix, [rows][ceil(columns / group)] of an output-major one.
//
// The formats of GGUF files, input-major only, keep the file's own numbers (transcode.cpp writes them):
// - data: four bits of each weight. Byte 16 L + 4 u + e of the 64 bytes of a block of 128 columns holds column
//   16 u + 4 L + e below and the one 64 further above (L, u, e = 0 .. 3): where interleaving four rows'
//   bytes leaves each sum is then where its column is.
// - plane: the bits above those. One: byte 4 u + e of 16 holds at bit 2 L that of the byte's lower column, at
//   2 L + 1 the upper's. Two: byte 16 (L % 2) + 4 u + e of 32 holds them at bits 4 (L / 2) and 4 (L / 2) + 2.
// - K formats: weight = scale * sub_scale * level - minimum * sub_minimum, scale and minimum [rows / 256]
//   [columns]. Others: scale * level + minimum. Levels without minima count from the middle.
// Numbers of groups are rounded up: the last of each may be shorter. Our own four bits (acttail_fit) are Q4_K with
// scales and minima of seven bits within a super-block instead of six.
struct acttail_matrix {
  int32_t format;  // 0 fp32, 1 bf16, 2 int8, 3 int4, 4 Q4_K, 5 Q5_K, 6 Q6_K, 7 Q5_0, 8 Q5_1 (formats.hpp)
  int32_t group;   // inputs that share a scale; 0 without scales
  int64_t rows;
  int64_t columns;    // padded to a multiple of 64, of 128 in the formats of files
  const void* data;   // [rows][columns]
  const uint16_t* scale;
  const uint16_t* minimum;  // null: symmetric levels
  const void* plane;         // [rows][columns] of one or two bits, or null
  const void* sub_scale;     // [rows / 32][columns] bytes; Q6_K: [rows / 16][columns] signed ones; or null
  const void* sub_minimum;   // [rows / 128][columns][4] bytes, one for each 32 inputs; or null
  // From how many vectors on, whose lists of kept rows differ, rows are read once for all of them: 0 for what the format
  // says, ACTTAIL_NEVER for none. What they get is the same.
  int32_t together;
  int32_t padding;
};

// One projection's outputs among those that read the same vector: columns begin .. end (whole blocks of its
// matrix), of which the first `outputs` hold weights and the rest is padding.
struct acttail_segment {
  int64_t begin;
  int64_t end;
  int64_t outputs;
  int64_t k;
  const float* score_scale;  // [rows] or null
  float threshold;
  int32_t rule;
  int32_t dense_kernel;  // read every row even though most of x is zeroed (faster at high density)
  int32_t padding;
};

// Projections that read one vector, side by side, in any order: each begins where the one before it ends.
// A row that several of them keep is read in one run where they are neighbours in one matrix, so whoever lays
// a matrix out puts first what keeps most. Projections of one format share a matrix; each further format
// has one of its own, whose columns begin where those of the matrix before it end. No projection lies in two.
struct acttail_fused {
  struct acttail_matrix matrix[3];
  struct acttail_segment segment[3];
  const float* bias;  // [columns] of all matrices together, or null
  int32_t segments;   // 1 to 3
  int32_t matrices;   // 1 to 3, all of the same rows
};

struct acttail_norm {
  const float* weight;  // [n]; null: no norm here
  const float* bias;    // [n] or null; of LayerNorm only
  int32_t rectified;    // 1: ReLU follows
  int32_t padding;
};

// down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate.
struct acttail_mlp {
  struct acttail_fused gate_up, down;
  int64_t gate_offset, up_offset;  // columns of gate_up; gate_offset < 0: no gate
  int64_t intermediate;
};

// A block has an MLP of its own, or experts of which a router chooses some for each token, or both: then what its own,
// which every token visits, makes is added to the experts'.
struct acttail_block {
  struct acttail_fused qkv, o;
  struct acttail_mlp mlp;  // its own; without matrices: none
  struct acttail_norm input_norm;           // before attention
  struct acttail_norm attention_norm;       // on the attention's output, before it is added
  struct acttail_norm mlp_norm;             // before the MLP
  struct acttail_norm output_norm;          // on the MLP's output, before it is added
  struct acttail_norm q_norm, k_norm;       // per head
  int64_t q_offset, k_offset, v_offset;     // columns of qkv
  int64_t window;                           // positions a token sees, itself included; 0: all
  // Output-major fp32 [experts + shared_gate][hidden]. Of the softmax over the experts' products the `active` largest
  // are their experts' weights.
  struct acttail_matrix router;
  const struct acttail_mlp* expert;
  int64_t experts, active;  // 0: none
  int32_t rope;             // which rope table; -1: none
  int32_t parallel;         // 1: the MLP reads the stream as it was before the attention
  int32_t normalised;       // 1: the active experts' weights are divided by their sum
  int32_t shared_gate;      // 1: the sigmoid of the router's last product is the weight of the block's own MLP
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
  // Output-major [vocabulary][hidden]. Without data: the columns of head_input's matrix are the embeddings, which are tied
  // to the head.
  struct acttail_matrix embedding;
  struct acttail_matrix head;       // output-major [vocabulary][hidden]; not read if head_input has a matrix
  // The output head as a projection of one segment. With a matrix, input-major [hidden][vocabulary]: kept
  // rows alone are read. Without one, only the selection: `head` is read whole, on the input masked by it. No
  // segments: dense.
  struct acttail_fused head_input;
  struct acttail_norm final_norm;
  const float* head_bias;  // [vocabulary] or null
  const float* position;   // [positions][hidden], added to the embedding; or null. No sequence is longer
  // intermediate: of the widest MLP.
  int64_t blocks, ropes, hidden, heads, kv_heads, head_dim, intermediate, vocabulary, positions;
  float norm_eps, attention_scale, attention_softcap, logit_softcap, embedding_scale;
  float residual_scale;  // of what the attention and the MLP add to the stream
  float logit_scale;     // of the head's products, before its bias and the bound
  int32_t layer_norm;  // 1: LayerNorm instead of RMSNorm
  int32_t activation;  // an acttail_activation
  int32_t kv_format;   // 0 fp32, 1 bf16, 2 int8 (formats.hpp)
  int32_t padding;
};

struct acttail_engine;
struct acttail_pool;
struct acttail_cache;

// Makes an engine, if all sizes, offsets, formats and rules of the model are such that no call can read or write
// outside of what is described; what pointers lead to cannot be checked. Its tokens are run by 1 to 256 threads together. The structs are copied; what they point to
// must outlive the engine. *engine is null unless the status is ACTTAIL_OK.
ACTTAIL_API int acttail_engine_new(const struct acttail_model* model, int threads,
                                   struct acttail_engine** engine);
ACTTAIL_API void acttail_engine_free(struct acttail_engine* engine);

// A pool counts the memory of the caches that are made in it; they may outlive it.
ACTTAIL_API int acttail_pool_new(struct acttail_pool** pool);
ACTTAIL_API void acttail_pool_free(struct acttail_pool* pool);
// Bytes of all pages that its caches hold now; what several hold counts once.
ACTTAIL_API int64_t acttail_pool_bytes(const struct acttail_pool* pool);

// Makes an empty KV cache, in a pool unless that is null, that may grow to `capacity` positions; its memory comes in pages of 32 positions as they
// are reached. *cache is null unless the status is ACTTAIL_OK.
ACTTAIL_API int acttail_cache_new(const struct acttail_engine* engine, const struct acttail_pool* pool,
                                  int64_t capacity, struct acttail_cache** cache);
// Makes one that begins with the first `length` positions of another. The two share their pages; one that either
// writes to is copied first. No call may run on either meanwhile.
ACTTAIL_API int acttail_cache_fork(const struct acttail_cache* from, int64_t length, int64_t capacity,
                                   struct acttail_cache** cache);
ACTTAIL_API void acttail_cache_free(struct acttail_cache* cache);
ACTTAIL_API int64_t acttail_cache_length(const struct acttail_cache* cache);
// Bytes of the pages it holds, shared or not.
ACTTAIL_API int64_t acttail_cache_bytes(const struct acttail_cache* cache);
// Bytes that `count` further positions would allocate; -1 if there is no room for them.
ACTTAIL_API int64_t acttail_cache_lacks(const struct acttail_cache* cache, int64_t count);
// Forget all positions from `length` on.
ACTTAIL_API int acttail_cache_truncate(struct acttail_cache* cache, int64_t length);
// Store keys and values [count][kv_heads][head_dim] of one block at positions first .. first + count - 1, which are to
// begin no later than what is stored ends.
ACTTAIL_API int acttail_cache_write(struct acttail_cache* cache, int64_t block, int64_t first,
                                    int64_t count, const float* keys, const float* values);
// Read them back.
ACTTAIL_API int acttail_cache_read(struct acttail_cache* cache, int64_t block, int64_t first,
                                   int64_t count, float* keys, float* values);
// Say how many positions hold data, after acttail_cache_write on every block.
ACTTAIL_API int acttail_cache_set_length(struct acttail_cache* cache, int64_t length);

// Run `count` tokens one after the other. logits is [count][vocabulary] if all_logits, else
// [vocabulary] of the last token. read, if not null, receives how many weights all these tokens read: of every
// projection, the rows it read (those it keeps, all of them under a dense kernel) times its outputs, and
// vocabulary * hidden for every row of logits, or what was read of a head with rows of its own; of experts those
// that were chosen. Padding, scales, norms, routers and the embedding's row do not count, so that a dense token without logits reads exactly as many
// weights as its projections have. An engine belongs to the process that made it: in a
// child of fork() its threads are not there, and the call says ACTTAIL_FAILED.
ACTTAIL_API int acttail_engine_forward(struct acttail_engine* engine, struct acttail_cache* cache,
                                       const int64_t* tokens, int64_t count, int all_logits,
                                       float* logits, double* read);

// Run 1 to 128 tokens in one pass, which reads and unpacks each weight once for every eight of them: token i is the next
// one of caches[i], where several are of one cache the next ones in order. Each gets, bit for bit, what it would get
// alone. The engine keeps memory for as many as it has run so. logits[i] is [vocabulary] or null; read, if not null,
// receives how many weights each token would have read alone.
ACTTAIL_API int acttail_engine_step(struct acttail_engine* engine, struct acttail_cache* const* caches,
                                    const int64_t* tokens, int64_t count, float* const* logits, double* read);

// Decode rows first .. last - 1 of an input-major matrix, columns begin .. end, to bfloat16 (or fp32)
// [last - first][end - begin].
ACTTAIL_API int acttail_decode_rows(const struct acttail_matrix* m, int64_t first, int64_t last,
                                    int64_t begin, int64_t end, int as_float, void* out, int threads);
// Columns of an input-major matrix as fp32: out[i] is column columns[i], [count][rows].
ACTTAIL_API int acttail_gather_columns(const struct acttail_matrix* m, const int64_t* columns, int64_t count, float* out,
                                       int threads);
// y[b][j] += sum over the kept rows for 1 to 8 vectors that keep the same ones; see kernels.def. x is
// [count][batch], y[b] begins `stride` entries after y[b - 1].
ACTTAIL_API int acttail_add_rows(const struct acttail_matrix* m, const int32_t* index, const float* x,
                                 int64_t count, int64_t begin, int64_t end, float* y, int64_t batch,
                                 int64_t stride);
// The same for vectors with a list each: index and x are [batch][count]. Rows are read once for all of them or for each
// anew, as m->together has it.
ACTTAIL_API int acttail_add_lists(const struct acttail_matrix* m, const int32_t* index, const float* x, int64_t count,
                                  int64_t begin, int64_t end, float* y, int64_t batch, int64_t stride);
// y[b] = W TopK(x[b]) of an input-major matrix for 1 to 8 vectors; x is [vectors][m->rows], y
// [vectors][m->columns].
ACTTAIL_API int acttail_sparse_linear(const struct acttail_matrix* m, const float* x, int64_t vectors,
                                      int64_t k, float* y, int threads);
// Writes the blocks of a GGUF tensor [outputs][inputs], of a type (ggml's number) whose numbers the matrix' format holds
// (Q4_0, Q4_1: int4; Q8_0, IQ4_NL: int8; Q3_K, Q6_K: Q6_K; Q4_K, Q5_K, Q5_0, Q5_1: their own), into columns `column` ..
// of an input-major matrix, whose arrays must be writable; `column` is a multiple of the format's block of 64 or 128,
// and what is left of the last one becomes zeros. Inputs are the matrix' rows, its group those of a block of the file.
// Column j takes output order[j], j itself if order is null.
ACTTAIL_API int acttail_transcode(const struct acttail_matrix* m, int64_t column, int32_t type, const void* blocks,
                                  int64_t outputs, const int64_t* order, int threads);
// Writes a GGUF tensor [rows][inputs] of a type (ggml's number: Q4_0 .. Q8_0, Q2_K .. Q6_K, IQ4_NL, IQ4_XS, F32, F16,
// BF16) into an output-major int8 matrix with a scale for every 32 inputs; inputs are a multiple of a block and of 32.
ACTTAIL_API int acttail_refit(const struct acttail_matrix* m, int64_t inputs, int32_t type, const void* blocks,
                              int threads);
// Fits floats [outputs][rows] to four bits, into columns `column` .. of a Q4_K matrix of any number of rows, whose
// arrays must be writable; `column` is a multiple of 128, and what is left of the last block becomes zeros.
ACTTAIL_API int acttail_fit(const struct acttail_matrix* m, int64_t column, const float* values, int64_t outputs,
                            int threads);
// y = W x of an output-major matrix; x is [columns], y [rows].
ACTTAIL_API int acttail_dot_rows(const struct acttail_matrix* m, const float* x, float* y);

#ifdef __cplusplus
}
#endif
