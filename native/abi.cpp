// What a caller asks before it uses anything else: the version of the ABI, the layout of its structs and
// the instruction set in use.
#include <cstddef>
#include <cstring>

#include "engine.h"
#include "kernels.hpp"

namespace {

struct Field {
  const char* structure;
  const char* field;  // null: the whole struct
  int64_t offset, size;
};

#define STRUCT(s) {#s, nullptr, 0, sizeof(acttail_##s)}
#define FIELD(s, f) {#s, #f, offsetof(acttail_##s, f), sizeof(acttail_##s::f)}

constexpr Field kFields[] = {
    STRUCT(matrix), FIELD(matrix, format), FIELD(matrix, group), FIELD(matrix, rows),
    FIELD(matrix, columns), FIELD(matrix, data), FIELD(matrix, scale), FIELD(matrix, minimum),
    FIELD(matrix, plane), FIELD(matrix, sub_scale), FIELD(matrix, sub_minimum), FIELD(matrix, together), FIELD(matrix, padding),

    STRUCT(segment), FIELD(segment, begin), FIELD(segment, end), FIELD(segment, outputs),
    FIELD(segment, k), FIELD(segment, score_scale), FIELD(segment, threshold), FIELD(segment, rule),
    FIELD(segment, dense_kernel), FIELD(segment, padding),

    STRUCT(fused), FIELD(fused, matrix), FIELD(fused, segment), FIELD(fused, bias),
    FIELD(fused, segments), FIELD(fused, matrices),

    STRUCT(norm), FIELD(norm, weight), FIELD(norm, bias), FIELD(norm, rectified), FIELD(norm, padding),

    STRUCT(mlp), FIELD(mlp, gate_up), FIELD(mlp, down), FIELD(mlp, gate_offset), FIELD(mlp, up_offset),
    FIELD(mlp, intermediate),

    STRUCT(block), FIELD(block, qkv), FIELD(block, o), FIELD(block, mlp),
    FIELD(block, input_norm), FIELD(block, attention_norm), FIELD(block, mlp_norm),
    FIELD(block, output_norm), FIELD(block, q_norm), FIELD(block, k_norm), FIELD(block, q_offset),
    FIELD(block, k_offset), FIELD(block, v_offset), FIELD(block, window), FIELD(block, router),
    FIELD(block, expert), FIELD(block, experts), FIELD(block, active), FIELD(block, rope),
    FIELD(block, parallel), FIELD(block, normalised), FIELD(block, shared_gate),

    STRUCT(rope), FIELD(rope, inv_freq), FIELD(rope, half), FIELD(rope, scale), FIELD(rope, padding),

    STRUCT(model), FIELD(model, block), FIELD(model, rope), FIELD(model, embedding),
    FIELD(model, head), FIELD(model, head_input), FIELD(model, final_norm),
    FIELD(model, head_bias), FIELD(model, position), FIELD(model, blocks), FIELD(model, ropes),
    FIELD(model, hidden), FIELD(model, heads), FIELD(model, kv_heads), FIELD(model, head_dim),
    FIELD(model, intermediate), FIELD(model, vocabulary), FIELD(model, positions), FIELD(model, norm_eps),
    FIELD(model, attention_scale), FIELD(model, attention_softcap), FIELD(model, logit_softcap),
    FIELD(model, embedding_scale), FIELD(model, residual_scale), FIELD(model, logit_scale),
    FIELD(model, layer_norm), FIELD(model, activation), FIELD(model, kv_format), FIELD(model, padding),
};

bool same(const char* a, const char* b) {
  return a == nullptr || b == nullptr ? a == b : std::strcmp(a, b) == 0;
}

}  // namespace

extern "C" {

int acttail_abi(void) { return ACTTAIL_ABI; }

int acttail_layout(const char* structure, const char* field, int64_t* offset, int64_t* size) {
  if (structure == nullptr || offset == nullptr || size == nullptr) return ACTTAIL_BAD_ARGUMENT;
  for (const Field& f : kFields) {
    if (!same(f.structure, structure) || !same(f.field, field)) continue;
    *offset = f.offset;
    *size = f.size;
    return ACTTAIL_OK;
  }
  return ACTTAIL_BAD_ARGUMENT;
}

const char* acttail_isa(void) { return acttail::kernels().name; }

}  // extern "C"
