#include "check.hpp"

#include "formats.hpp"
#include "route.hpp"
#include "select.hpp"

namespace acttail {

namespace {

// Blocks, heads, experts and rope tables.
constexpr int64_t kMostParts = int64_t{1} << 16;
// Experts that a token visits in a block; spec.py says the same.
constexpr int64_t kMostActive = 256;

bool runnable(const acttail_segment& s, int64_t inputs) {
  const bool selects = s.rule == ACTTAIL_DENSE || s.rule == ACTTAIL_THRESHOLD ||
                       (s.rule == ACTTAIL_TOPK && s.k >= 1 && s.k <= inputs);
  return selects && s.end > s.begin && s.end <= kMostSegments * kMost && s.outputs >= 1 && s.outputs <= s.end - s.begin;
}

// Matrices of the same inputs, and segments one after the other from column 0 to the last, each in one of them.
bool runnable(const acttail_fused& fused, int64_t inputs) {
  if (fused.segments < 1 || fused.segments > kMostSegments || fused.matrices < 1 ||
      fused.matrices > fused.segments) {
    return false;
  }
  int64_t column = 0, at = 0;
  int i = 0;
  for (int m = 0; m < fused.matrices; ++m) {
    const acttail_matrix& matrix = fused.matrix[m];
    if (!usable(matrix) || matrix.rows != inputs) return false;
    const int64_t block = kFormatTraits[matrix.format].block;
    for (; i < fused.segments && column < at + matrix.columns; ++i) {
      const acttail_segment& s = fused.segment[i];
      if (s.begin != column || !runnable(s, inputs) || (s.end - at) % block) return false;
      column = s.end;
    }
    at += matrix.columns;
    if (column != at) return false;
  }
  return i == fused.segments;
}

bool holds(const acttail_fused& fused, int64_t offset, int64_t columns) {
  return offset >= 0 && columns <= columns_of(fused) && offset <= columns_of(fused) - columns;
}

bool apart(int64_t a, int64_t a_columns, int64_t b, int64_t b_columns) {
  return a + a_columns <= b || b + b_columns <= a;
}

// A norm has a weight if it must be there, and a bias nowhere but in LayerNorm.
bool runnable(const acttail_norm& n, const acttail_model& m, bool needed) {
  return (n.weight != nullptr || (!needed && n.bias == nullptr)) && (n.bias == nullptr || m.layer_norm != 0);
}

bool runnable(const acttail_mlp& p, const acttail_model& m) {
  const int64_t n = p.intermediate;
  return n >= 1 && n <= m.intermediate && runnable(p.gate_up, m.hidden) && runnable(p.down, n) &&
         holds(p.gate_up, p.up_offset, n) && holds(p.down, 0, m.hidden) &&
         (p.gate_offset < 0 || (holds(p.gate_up, p.gate_offset, n) && apart(p.gate_offset, n, p.up_offset, n)));
}

// A router and what it chooses from, or neither, and an MLP that every token visits where there is no router.
bool routed(const acttail_block& b, const acttail_model& m) {
  const bool own = own_mlp(b);
  if (own ? !runnable(b.mlp, m) : b.mlp.gate_up.segments != 0 || b.mlp.down.matrices != 0) return false;
  if (b.experts == 0) return own && b.active == 0 && b.shared_gate == 0;
  const bool gated = b.shared_gate == 0 || (b.shared_gate == 1 && own);
  if (b.experts < 0 || b.experts > kMostParts || b.expert == nullptr || b.active < 1 || b.active > kMostActive ||
      b.active > b.experts || !gated || b.router.format != kF32 || !usable_output_major(b.router) ||
      b.router.rows != b.experts + b.shared_gate || b.router.columns != padded(m.hidden)) {
    return false;
  }
  for (int64_t e = 0; e < b.experts; ++e) {
    if (!runnable(b.expert[e], m)) return false;
  }
  return true;
}

bool runnable(const acttail_block& b, const acttail_model& m) {
  const int64_t heads = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
  return runnable(b.qkv, m.hidden) && runnable(b.o, heads) && holds(b.qkv, b.q_offset, heads) &&
         holds(b.qkv, b.k_offset, kv) && holds(b.qkv, b.v_offset, kv) && holds(b.o, 0, m.hidden) &&
         apart(b.q_offset, heads, b.k_offset, kv) && apart(b.q_offset, heads, b.v_offset, kv) &&
         apart(b.k_offset, kv, b.v_offset, kv) && routed(b, m) &&
         runnable(b.input_norm, m, true) && runnable(b.mlp_norm, m, true) &&
         runnable(b.attention_norm, m, false) && runnable(b.output_norm, m, false) &&
         runnable(b.q_norm, m, false) && runnable(b.k_norm, m, false) && b.window >= 0 && b.rope >= -1 &&
         b.rope < m.ropes;
}

// An output-major table [vocabulary][hidden].
bool table(const acttail_matrix& m, const acttail_model& model) {
  return usable_output_major(m) && m.rows == model.vocabulary && m.columns == padded(model.hidden);
}

// The head as a projection, see acttail_model.
bool projected(const acttail_model& m) {
  const acttail_fused& f = m.head_input;
  if (f.segments == 0 && f.matrices == 0) return true;
  const bool whole = f.segments == 1 && f.segment[0].begin == 0 && f.segment[0].outputs == m.vocabulary &&
                     f.bias == nullptr;
  return whole && (f.matrices == 0 ? runnable(f.segment[0], m.hidden) : runnable(f, m.hidden));
}

}  // namespace

bool runnable(const acttail_model& m) {
  const auto within = [](int64_t n, int64_t most) { return n >= 1 && n <= most; };
  const bool sized = within(m.blocks, kMostParts) && m.ropes >= 0 && m.ropes <= kMostParts &&
                     within(m.hidden, kMost) && within(m.heads, kMostParts) && within(m.kv_heads, m.heads) &&
                     m.heads % m.kv_heads == 0 && within(m.head_dim, kMost / m.heads) &&
                     within(m.intermediate, kMost / 2) && within(m.vocabulary, kMost);
  if (!sized || m.block == nullptr || (m.rope == nullptr && m.ropes > 0) || m.kv_format < 0 ||
      m.kv_format >= kKvFormats || m.activation < ACTTAIL_SILU || m.activation > ACTTAIL_RELU ||
      !projected(m) || (m.embedding.data == nullptr ? m.head_input.matrices == 0 : !table(m.embedding, m)) ||
      (m.head_input.matrices == 0 && !table(m.head, m)) ||
      !runnable(m.final_norm, m, true) || (m.position != nullptr && !within(m.positions, kMost))) {
    return false;
  }
  for (int64_t r = 0; r < m.ropes; ++r) {
    if (m.rope[r].inv_freq == nullptr || m.rope[r].half < 0 || m.rope[r].half > m.head_dim / 2) return false;
  }
  for (int64_t i = 0; i < m.blocks; ++i) {
    if (!runnable(m.block[i], m)) return false;
  }
  return true;
}

}  // namespace acttail
