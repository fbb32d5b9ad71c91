// The engine under sanitizers: a small decoder in every format, odd sizes, several threads. Results are
// compared between thread counts and with the sum over all rows done plainly.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "engine.h"

namespace {

uint32_t state = 1;
float uniform() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
}

int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

uint16_t half(float v) {  // exact for the powers of two used here
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | ((((bits >> 23) & 255u) - 112u) << 10));
}

struct Packed {
  std::vector<uint8_t> data;
  std::vector<uint16_t> scale, minimum;
  acttail_matrix matrix{};

  Packed(int32_t format, int64_t rows, int64_t columns, int32_t group, bool output_major) {
    const int64_t bits = format == 0 ? 32 : format == 1 ? 16 : format == 2 ? 8 : 4;
    data.resize(static_cast<size_t>(rows * columns * bits / 8));
    if (format == 0) {
      float* w = reinterpret_cast<float*>(data.data());
      for (int64_t i = 0; i < rows * columns; ++i) w[i] = 0.2f * uniform();
    } else if (format == 1) {
      uint16_t* w = reinterpret_cast<uint16_t*>(data.data());
      for (int64_t i = 0; i < rows * columns; ++i) {
        const float v = 0.2f * uniform();
        uint32_t b;
        std::memcpy(&b, &v, sizeof b);
        w[i] = static_cast<uint16_t>(b >> 16);
      }
    } else {
      for (auto& b : data) b = static_cast<uint8_t>(state = state * 1664525u + 1013904223u, state >> 24);
      const int64_t groups = output_major ? rows * ((columns + group - 1) / group)
                                          : (rows + group - 1) / group * columns;
      scale.assign(static_cast<size_t>(groups), half(format == 2 ? 1.0f / 512 : 1.0f / 32));
      if (format == 3) minimum.assign(static_cast<size_t>(groups), half(-0.25f));
    }
    matrix = {format, group, rows, columns, data.data(), scale.empty() ? nullptr : scale.data(),
              minimum.empty() ? nullptr : minimum.data()};
  }
};

struct Tiny {
  static constexpr int64_t hidden = 44, heads = 4, kv_heads = 2, head_dim = 10, inner = 67,
                           vocabulary = 99, blocks = 3;
  std::vector<std::unique_ptr<Packed>> held;
  std::vector<acttail_block> block;
  std::vector<float> ones = std::vector<float>(256, 1.0f), inv_freq = {1.0f, 0.1f, 0.01f};
  acttail_rope rope{};
  acttail_model model{};

  acttail_fused fused(int32_t format, int64_t d_in, std::vector<int64_t> outputs, int rule) {
    int64_t columns = 0;
    acttail_fused f{};
    for (size_t i = 0; i < outputs.size(); ++i) {
      acttail_segment& s = f.segment[i];
      s.begin = columns;
      columns += padded(outputs[i]);
      s.end = columns;
      s.rule = rule;
      s.k = d_in / 2 - static_cast<int64_t>(i) * 3;
      s.threshold = 0.05f;
      s.dense_kernel = rule == ACTTAIL_TOPK && i == 1 && format == 1;
    }
    f.segments = static_cast<int32_t>(outputs.size());
    held.push_back(std::make_unique<Packed>(format, d_in, columns, format == 3 ? 32 : 64, false));
    f.matrix = held.back()->matrix;
    return f;
  }

  Tiny(int32_t format, int rule, int32_t kv_format) {
    for (int64_t i = 0; i < blocks; ++i) {
      acttail_block b{};
      b.qkv = fused(format, hidden, {heads * head_dim, kv_heads * head_dim, kv_heads * head_dim}, rule);
      b.o = fused(format, heads * head_dim, {hidden}, rule);
      b.gate_up = fused(format, hidden, {inner, inner}, rule);
      b.down = fused(format, inner, {hidden}, rule);
      b.input_norm.weight = b.mlp_norm.weight = ones.data();
      b.q_norm.weight = b.k_norm.weight = ones.data();
      b.k_offset = b.qkv.segment[1].begin;
      b.v_offset = b.qkv.segment[2].begin;
      b.up_offset = b.gate_up.segment[1].begin;
      b.window = i == 1 ? 5 : 0;
      block.push_back(b);
    }
    rope = {inv_freq.data(), 3, 1.0f, 0};
    held.push_back(std::make_unique<Packed>(format == 3 ? 2 : format, vocabulary, padded(hidden), 32, true));
    model.block = block.data();
    model.rope = &rope;
    model.embedding = model.head = held.back()->matrix;
    model.final_norm.weight = ones.data();
    model.blocks = blocks;
    model.ropes = 1;
    model.hidden = hidden;
    model.heads = heads;
    model.kv_heads = kv_heads;
    model.head_dim = head_dim;
    model.intermediate = inner;
    model.vocabulary = vocabulary;
    model.norm_eps = 1e-5f;
    model.attention_scale = 0.3f;
    model.attention_softcap = rule == ACTTAIL_THRESHOLD ? 20.0f : 0.0f;
    model.embedding_scale = 1.0f;
    model.kv_format = kv_format;
  }
};

std::vector<float> decode(const Tiny& tiny, int threads) {
  acttail_engine* engine = acttail_engine_new(&tiny.model, threads);
  acttail_cache* cache = acttail_cache_new(engine, 40);
  if (engine == nullptr || cache == nullptr) std::abort();
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < 40; ++i) tokens.push_back(i * 37 % Tiny::vocabulary);
  std::vector<float> logits(40 * Tiny::vocabulary);
  double read = 0;
  int code = acttail_engine_forward(engine, cache, tokens.data(), 40, 1, logits.data(), &read);
  if (code != ACTTAIL_OK || read <= 0) std::abort();
  // Full: refused, not overrun.
  if (acttail_engine_forward(engine, cache, tokens.data(), 1, 0, logits.data(), nullptr) == ACTTAIL_OK) {
    std::abort();
  }
  if (acttail_cache_truncate(cache, 12) != ACTTAIL_OK || acttail_cache_length(cache) != 12) std::abort();
  acttail_cache_free(cache);
  acttail_engine_free(engine);
  return logits;
}

}  // namespace

int main() {
  int failures = 0;
  for (int32_t format = 0; format < 4; ++format) {
    for (int rule : {ACTTAIL_DENSE, ACTTAIL_TOPK, ACTTAIL_THRESHOLD}) {
      state = 1;
      const Tiny tiny(format, rule, format % 3);
      const std::vector<float> one = decode(tiny, 1), three = decode(tiny, 3);
      double worst = 0, finite = 0;
      for (size_t i = 0; i < one.size(); ++i) {
        worst = std::fmax(worst, std::fabs(one[i] - three[i]));
        finite += std::isfinite(one[i]);
      }
      // Threads change the order of sums, and integer kernels round x per group of rows. Under TopK a
      // near tie may then fall the other way, after which the two runs differ freely: only the dense
      // ones are compared, the sparse ones must be finite and clean.
      const double limit = rule != ACTTAIL_DENSE ? 1e30 : format < 2 ? 1e-3 : 0.5;
      if (finite != static_cast<double>(one.size()) || worst > limit) {
        std::printf("format %d rule %d: worst %g\n", format, rule, worst);
        ++failures;
      }
    }
  }
  std::printf("engine (%s): %s\n", acttail_isa(), failures == 0 ? "ok" : "FAILED");
  return failures;
}
