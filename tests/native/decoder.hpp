// A small random decoder of odd sizes: as the engine takes it, and computed plainly in float64 from the same
// weights. A weight is a hash of where it is, so that both sides agree whatever the layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "engine.h"
#include "formats.hpp"

namespace decoder {

using acttail::padded;

inline uint32_t mix(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t h = 0x9E3779B9u;
  for (uint32_t v : {a, b, c, d}) {
    h = (h ^ v) * 0x85EBCA6Bu;
    h ^= h >> 13;
    h *= 0xC2B2AE35u;
    h ^= h >> 16;
  }
  return h;
}
inline float unit(uint32_t h) { return static_cast<float>(h >> 8) / 8388608.0f - 1.0f; }

// IEEE half of a power of two of this exponent.
inline uint16_t power(int exponent) { return static_cast<uint16_t>((exponent + 15) << 10); }

// Weights of one projection, or of one table.
struct Weights {
  uint32_t seed, id;
  int32_t format;
  int64_t group;  // along the inputs
  int64_t inputs, outputs;

  uint32_t hash(int64_t i, int64_t o) const {
    return mix(seed, id, static_cast<uint32_t>(i), static_cast<uint32_t>(o));
  }
  int exponent(int64_t i, int64_t o) const {
    const int spread = static_cast<int>(mix(seed, id + 7919, static_cast<uint32_t>(i / group), static_cast<uint32_t>(o)) % 2);
    return (format == acttail::kInt8 ? -9 : -5) - spread;
  }
  int level(int64_t i, int64_t o) const {  // of int8 and int4
    const uint32_t h = hash(i, o);
    return format == acttail::kInt8 ? static_cast<int8_t>(h >> 24) : static_cast<int>(h >> 28);
  }
  float plain(int64_t i, int64_t o) const {  // of fp32 and bf16, which holds eight bits exactly
    const uint32_t h = hash(i, o);
    return format == acttail::kF32 ? 0.2f * unit(h) : static_cast<float>(static_cast<int8_t>(h >> 24)) / 512;
  }
  double value(int64_t i, int64_t o) const {
    if (!acttail::kFormatTraits[format].scaled) return static_cast<double>(plain(i, o));
    const double scaled = level(i, o) * std::ldexp(1.0, exponent(i, o));
    return format == acttail::kInt4 ? scaled - 0.25 : scaled;
  }
};

// Weights as the kernels read them; what is beyond a projection's outputs or a table's inputs is noise.
struct Packed {
  std::vector<uint8_t> data;
  std::vector<uint16_t> scale, minimum;
  acttail_matrix matrix{};

  void put(int64_t row, int64_t column, const Weights& w, int64_t i, int64_t o) {
    const int64_t at = row * matrix.columns + column;
    if (w.format == acttail::kF32) {
      const float v = w.plain(i, o);
      std::memcpy(data.data() + 4 * at, &v, 4);
    } else if (w.format == acttail::kBf16) {
      const float v = w.plain(i, o);
      std::memcpy(data.data() + 2 * at, reinterpret_cast<const char*>(&v) + 2, 2);
    } else if (w.format == acttail::kInt8) {
      data[static_cast<size_t>(at)] = static_cast<uint8_t>(w.level(i, o));
    } else {
      const int64_t in_block = column % 64;
      uint8_t& byte = data[static_cast<size_t>((at - in_block) / 2 + in_block % 32)];
      const int shift = in_block < 32 ? 0 : 4;
      byte = static_cast<uint8_t>((byte & (0xF0 >> shift)) | (w.level(i, o) << shift));
    }
  }
  void allocate(int32_t format, int64_t group, int64_t rows, int64_t columns, int64_t scales) {
    matrix = {format, static_cast<int32_t>(group), rows, columns, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 0};
    data.resize(static_cast<size_t>(rows * acttail::row_bytes(matrix)));
    for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(mix(1, 2, 3, static_cast<uint32_t>(i)) & 0x3F);
    if (acttail::kFormatTraits[format].scaled) scale.assign(static_cast<size_t>(scales), power(-6));
    if (format == acttail::kInt4) minimum.assign(scale.size(), 0xB400);  // -0.25
    matrix.data = data.data();
    matrix.scale = scale.empty() ? nullptr : scale.data();
    matrix.minimum = minimum.empty() ? nullptr : minimum.data();
  }
  // Projections side by side, input-major.
  explicit Packed(const std::vector<Weights>& parts) {
    int64_t columns = 0;
    for (const Weights& w : parts) columns += padded(w.outputs);
    const Weights& f = parts[0];
    allocate(f.format, f.group, f.inputs, columns, (f.inputs + f.group - 1) / f.group * columns);
    int64_t begin = 0;
    for (const Weights& w : parts) {
      for (int64_t i = 0; i < w.inputs; ++i) {
        for (int64_t o = 0; o < w.outputs; ++o) {
          put(i, begin + o, w, i, o);
          if (!scale.empty()) {
            scale[static_cast<size_t>(i / w.group * columns + begin + o)] = power(w.exponent(i, o));
          }
        }
      }
      begin += padded(w.outputs);
    }
  }
  // Output-major.
  explicit Packed(const Weights& w) {
    const int64_t columns = padded(w.inputs), groups = (columns + w.group - 1) / w.group;
    allocate(w.format, w.group, w.outputs, columns, w.outputs * groups);
    for (int64_t o = 0; o < w.outputs; ++o) {
      for (int64_t i = 0; i < w.inputs; ++i) {
        put(o, i, w, i, o);
        if (!scale.empty()) scale[static_cast<size_t>(o * groups + i / w.group)] = power(w.exponent(i, o));
      }
    }
  }
};

struct Options {
  int32_t format = acttail::kF32;
  int32_t rule = ACTTAIL_DENSE;
  int32_t kv = acttail::kKvF32;
  bool layer_norm = false;  // with biases
  bool gated = true;
  bool biased = false;     // projections
  bool mixed = false;      // projections that read one vector have two formats
  bool one_scale = false;  // int8 and int4: one for all inputs of an output
  bool wina = false;       // score scales
  bool routed = false;     // the last block has experts beside an MLP of its own, the one before it experts alone
  bool tied = false;       // the head is input-major, and its columns are the embeddings
  bool learned = false;    // positions, halves of a block side by side, a bias of the head, factors
  int32_t activation = ACTTAIL_SILU;
  int order[3] = {0, 1, 2};  // of q, k, v in memory; gate and up are turned round where it descends
  uint32_t seed = 1;
};

// Kept entries differ enough between members of a matrix for their order to matter.
inline int64_t kept(int64_t inputs, int member) { return inputs / 2 - 4 * member; }
inline float threshold(int member) { return 0.3f + 0.1f * static_cast<float>(member); }

class Decoder {
 public:
  static constexpr int64_t hidden = 44, heads = 4, kv_heads = 2, head_dim = 10, inner = 67, vocabulary = 99,
                           blocks = 2, half = 3, positions = 64, experts = 5, active = 2, inside = 37;

  explicit Decoder(const Options& options) : o(options) {
    for (int i = 0; i < 256; ++i) {
      norm_.push_back(1.0f + 0.3f * unit(mix(o.seed, 1, 0, static_cast<uint32_t>(i))));
      shift_.push_back(0.2f * unit(mix(o.seed, 2, 0, static_cast<uint32_t>(i))));
      score_.push_back(0.5f + std::fabs(unit(mix(o.seed, 3, 0, static_cast<uint32_t>(i)))));
      noise_.push_back(0.3f * unit(mix(o.seed, 4, 0, static_cast<uint32_t>(i))));
    }
    for (int64_t b = 0; b < blocks; ++b) {
      acttail_block block{};
      int64_t at[3] = {};
      const bool turned = o.order[0] > o.order[1];
      const int two[2] = {turned, !turned};
      block.qkv = fuse(own(b), 0, {o.order, o.order + 3}, at, inner);
      block.q_offset = at[0], block.k_offset = at[1], block.v_offset = at[2];
      block.o = fuse(own(b), 3, {0}, at, inner);
      const auto mlp = [&](uint32_t base, int64_t n) {
        acttail_mlp m{};
        if (o.gated) {
          m.gate_up = fuse(base, 4, {two, two + 2}, at, n);
          m.gate_offset = at[0], m.up_offset = at[1];
        } else {
          m.gate_up = fuse(base, 5, {0}, at, n);
          m.gate_offset = -1, m.up_offset = at[0];
        }
        m.down = fuse(base, 6, {0}, at, n);
        m.intermediate = n;
        return m;
      };
      if (has_own(b)) block.mlp = mlp(own(b), inner);
      if (o.routed) {
        for (int64_t e = 0; e < experts; ++e) expert_[b].push_back(mlp(of_expert(b, e), inside));
        packed_.push_back(std::make_unique<Packed>(router(b)));
        block.router = packed_.back()->matrix;
        block.expert = expert_[b].data();
        block.experts = experts, block.active = active;
        block.normalised = b == 0;
        block.shared_gate = has_own(b);
      }
      const acttail_norm norm{norm_.data(), o.layer_norm ? shift_.data() : nullptr, 0, 0};
      block.input_norm = block.mlp_norm = block.q_norm = block.k_norm = norm;
      if (o.biased) block.attention_norm = block.output_norm = norm;
      block.window = b == 1 ? 3 : 0;
      block.parallel = o.learned;
      if (o.learned) block.rope = -1;
      block_.push_back(block);
    }
    rope_ = {inv_freq_, half, 1.0f, 0};
    const Weights table = this->table();
    model.block = block_.data();
    model.rope = &rope_;
    if (o.tied) {
      packed_.push_back(std::make_unique<Packed>(std::vector<Weights>{table}));
      model.head_input.matrix[0] = packed_.back()->matrix;
      model.head_input.segment[0] = {0, padded(vocabulary), vocabulary, hidden, nullptr, 0, ACTTAIL_DENSE, 0, 0};
      model.head_input.matrices = model.head_input.segments = 1;
    } else {
      packed_.push_back(std::make_unique<Packed>(table));
      model.embedding = model.head = packed_.back()->matrix;
    }
    model.final_norm = {norm_.data(), o.layer_norm ? shift_.data() : nullptr, 0, 0};
    model.blocks = blocks;
    model.ropes = 1;
    model.hidden = hidden, model.heads = heads, model.kv_heads = kv_heads, model.head_dim = head_dim;
    model.intermediate = inner, model.vocabulary = vocabulary;
    model.norm_eps = 1e-5f;
    model.attention_scale = 0.3f;
    model.attention_softcap = o.biased ? 20.0f : 0.0f;
    model.logit_softcap = o.biased ? 30.0f : 0.0f;
    model.embedding_scale = o.biased ? 1.5f : 1.0f;
    model.residual_scale = o.learned ? 0.7f : 1.0f;
    model.logit_scale = o.learned ? 1.3f : 1.0f;
    if (o.learned) {
      for (uint32_t i = 0; i < positions * hidden; ++i) position_.push_back(0.2f * unit(mix(o.seed, 5, 0, i)));
      model.position = position_.data();
      model.positions = positions;
      model.head_bias = noise_.data();
    }
    model.layer_norm = o.layer_norm;
    model.activation = o.activation;
    model.kv_format = o.kv;
  }
  Decoder(const Decoder&) = delete;

  acttail_model model{};

  // Logits [count][vocabulary] in float64. `margin` receives the smallest relative distance of an entry from
  // the point where its selection would turn, `read` the weights that an engine must report.
  std::vector<double> truth(const std::vector<int64_t>& tokens, double* margin, double* read) const {
    Truth t(*this);
    std::vector<double> out;
    for (int64_t token : tokens) t.token(token, out);
    *margin = t.margin;
    *read = t.read;
    return out;
  }

 private:
  using Vector = std::vector<double>;
  struct Member {
    Weights weights;
    int number;  // among those that read the same vector
    std::vector<double> value;  // [inputs][outputs]
  };

  Weights weights(uint32_t id, int64_t inputs, int64_t outputs, int32_t format, int64_t group) const {
    return {o.seed, id, format, group, inputs, outputs};
  }

  // Of the head and the embedding; output-major ones have no four bits here.
  Weights table() const {
    const bool wider = o.format == acttail::kInt4 && !o.tied;
    return weights(90, hidden, vocabulary, wider ? acttail::kInt8 : o.format, 32);
  }

  bool has_own(int64_t block) const { return !o.routed || block + 1 == blocks; }
  // Numbers of weights: of a block's own projections, and of an expert's, by kind from these on.
  static uint32_t own(int64_t block) { return static_cast<uint32_t>(100 + 10 * block); }
  static uint32_t of_expert(int64_t block, int64_t e) { return static_cast<uint32_t>(1000 + 100 * block + 10 * e); }
  Weights router(int64_t block) const {
    return weights(static_cast<uint32_t>(80 + block), hidden, experts + has_own(block), acttail::kF32, 32);
  }

  // Kinds: 0 q, 1 k, 2 v, 3 o, 4 gate, 5 up, 6 down; `inside` features are in the MLP.
  acttail_fused fuse(uint32_t base, int first, const std::vector<int>& order, int64_t* at, int64_t inside) {
    const int64_t outputs[] = {heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, hidden, inside,
                               inside, hidden};
    const int64_t inputs = first == 3 ? heads * head_dim : first == 6 ? inside : hidden;
    acttail_fused f{};
    std::vector<Weights> parts;
    int64_t column = 0;
    const auto finish = [&] {
      packed_.push_back(std::make_unique<Packed>(parts));
      f.matrix[f.matrices++] = packed_.back()->matrix;
      parts.clear();
    };
    for (int member : order) {
      const int kind = first + member;
      const uint32_t id = base + static_cast<uint32_t>(kind);
      // Of three that read one vector the last has another format, wherever it lies.
      const int32_t format = o.mixed && member == 2 ? (o.format + 1) % acttail::kQ4K : o.format;
      Member m{weights(id, inputs, outputs[kind], format, o.one_scale ? inputs : 32), member, {}};
      if (!parts.empty() && parts.back().format != format) finish();
      for (int64_t i = 0; i < inputs; ++i) {
        for (int64_t j = 0; j < outputs[kind]; ++j) m.value.push_back(m.weights.value(i, j));
      }
      acttail_segment& s = f.segment[f.segments++];
      s.begin = at[member] = column;
      s.outputs = outputs[kind];
      s.end = column += padded(s.outputs);
      s.rule = o.rule;
      s.k = kept(inputs, member);
      s.threshold = threshold(member);
      s.score_scale = o.wina && member != 1 ? score_.data() : nullptr;
      s.dense_kernel = dense_kernel(kind);
      parts.push_back(m.weights);
      members_.push_back(std::make_unique<Member>(std::move(m)));
      by_id_.push_back(id);
    }
    finish();
    if (o.biased) {
      // The bias goes with the output, wherever the order puts it.
      bias_.emplace_back(static_cast<size_t>(column), 0.0f);
      for (int i = 0; i < f.segments; ++i) {
        const size_t begin = static_cast<size_t>(f.segment[i].begin);
        for (size_t j = 0; j < static_cast<size_t>(f.segment[i].outputs); ++j) bias_.back()[begin + j] = noise_[j];
      }
      f.bias = bias_.back().data();
    }
    return f;
  }
  bool dense_kernel(int kind) const { return o.rule == ACTTAIL_TOPK && o.biased && kind == 1; }

  const Member& member(uint32_t base, int kind) const {
    const uint32_t id = base + static_cast<uint32_t>(kind);
    const auto at = std::find(by_id_.begin(), by_id_.end(), id) - by_id_.begin();
    return *members_[static_cast<size_t>(at)];
  }

  // One decoding run in float64.
  struct Truth {
    explicit Truth(const Decoder& decoder) : d(decoder) {}
    const Decoder& d;
    double margin = std::numeric_limits<double>::infinity(), read = 0;
    std::vector<Vector> keys[blocks][kv_heads], values[blocks][kv_heads];

    Vector norm(const Vector& x, size_t n) const {
      double mean = 0, square = 0;
      if (d.o.layer_norm) mean = std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(n);
      for (double v : x) square += (v - mean) * (v - mean);
      const double factor = 1 / std::sqrt(square / static_cast<double>(n) + 1e-5);
      Vector y(n);
      for (size_t i = 0; i < n; ++i) {
        y[i] = (x[i] - mean) * factor * static_cast<double>(d.norm_[i]) +
               (d.o.layer_norm ? static_cast<double>(d.shift_[i]) : 0.0);
      }
      return y;
    }

    Vector selected(const Member& m, int kind, Vector x) {
      const size_t n = x.size();
      if (d.o.rule == ACTTAIL_DENSE) {
        read += static_cast<double>(m.weights.inputs * m.weights.outputs);
        return x;
      }
      const bool wina = d.o.wina && m.number != 1;
      Vector score(n);
      for (size_t i = 0; i < n; ++i) score[i] = std::fabs(x[i]) * (wina ? static_cast<double>(d.score_[i]) : 1.0);
      Vector sorted = score;
      std::sort(sorted.begin(), sorted.end(), std::greater<double>());
      double cut = static_cast<double>(threshold(m.number));
      if (d.o.rule == ACTTAIL_TOPK) {
        const size_t k = static_cast<size_t>(kept(m.weights.inputs, m.number));
        // After a relu fewer than k may be left; the zeros that fill up change nothing.
        if (sorted[k - 1] > 0) margin = std::min(margin, (sorted[k - 1] - sorted[k]) / sorted[k - 1]);
        cut = (sorted[k - 1] + sorted[k]) / 2;
      } else {
        for (double s : score) margin = std::min(margin, std::fabs(s - cut) / cut);
      }
      int64_t count = 0;
      for (size_t i = 0; i < n; ++i) {
        if (score[i] > cut) ++count;
        else x[i] = 0;
      }
      if (d.o.rule == ACTTAIL_TOPK) count = kept(m.weights.inputs, m.number);
      read += static_cast<double>((d.dense_kernel(kind) ? m.weights.inputs : count) * m.weights.outputs);
      return x;
    }

    Vector project(uint32_t base, int kind, const Vector& input) {
      const Member& m = d.member(base, kind);
      const Vector x = selected(m, kind, input);
      Vector y(static_cast<size_t>(m.weights.outputs));
      for (size_t j = 0; j < y.size(); ++j) {
        for (size_t i = 0; i < x.size(); ++i) y[j] += x[i] * m.value[i * y.size() + j];
        if (d.o.biased) y[j] += static_cast<double>(d.noise_[j]);
      }
      return y;
    }

    double act(double v) const {
      switch (d.o.activation) {
        case ACTTAIL_SILU: return v / (1 + std::exp(-v));
        case ACTTAIL_GELU_TANH: return 0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
        case ACTTAIL_GELU_ERF: return 0.5 * v * (1 + std::erf(v * 0.7071067811865476));
        default: return std::max(v, 0.0);
      }
    }

    Vector head(const Vector& all, size_t index, bool turn) const {
      Vector h(all.begin() + static_cast<long>(index * head_dim), all.begin() + static_cast<long>((index + 1) * head_dim));
      if (!turn) return h;
      h = norm(h, head_dim);
      for (size_t i = 0; !d.o.learned && i < half; ++i) {
        const double angle = position * static_cast<double>(d.inv_freq_[i]);
        const double a = h[i], b = h[i + half];
        h[i] = a * std::cos(angle) - b * std::sin(angle);
        h[i + half] = b * std::cos(angle) + a * std::sin(angle);
      }
      return h;
    }

    // What a cache of this format gives back.
    Vector stored(Vector h) const {
      if (d.o.kv == acttail::kKvBf16) {
        for (double& v : h) {
          const float f = static_cast<float>(v);
          uint32_t bits;
          std::memcpy(&bits, &f, sizeof bits);
          bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
          float back;
          std::memcpy(&back, &bits, sizeof back);
          v = static_cast<double>(back);
        }
      } else if (d.o.kv == acttail::kKvInt8) {
        double top = 0;
        for (double v : h) top = std::max(top, std::fabs(v));
        for (double& v : h) v = std::nearbyint(v * 127 / top) * top / 127;
      }
      return h;
    }

    Vector attention(int64_t b, const Vector& x) {
      const Vector q = project(own(b), 0, x), k = project(own(b), 1, x), v = project(own(b), 2, x);
      Vector all;
      for (size_t h = 0; h < heads; ++h) {
        const size_t g = h / (heads / kv_heads);
        if (h % (heads / kv_heads) == 0) {
          keys[b][g].push_back(stored(head(k, g, true)));
          values[b][g].push_back(stored(head(v, g, false)));
        }
        const Vector query = head(q, h, true);
        const size_t n = keys[b][g].size();
        const size_t first = b == 1 && n > 3 ? n - 3 : 0;
        Vector weight(n, 0.0);
        double total = 0;
        for (size_t t = first; t < n; ++t) {
          double s = 0;
          for (size_t i = 0; i < head_dim; ++i) s += query[i] * keys[b][g][t][i];
          s *= static_cast<double>(d.model.attention_scale);
          if (d.o.biased) s = 20 * std::tanh(s / 20);
          total += weight[t] = std::exp(s);
        }
        for (size_t i = 0; i < head_dim; ++i) {
          double sum = 0;
          for (size_t t = first; t < n; ++t) sum += weight[t] / total * values[b][g][t][i];
          all.push_back(sum);
        }
      }
      return project(own(b), 3, all);
    }

    Vector mlp(uint32_t base, const Vector& h) {
      Vector up = project(base, 5, h);
      if (d.o.gated) {
        const Vector gate = project(base, 4, h);
        for (size_t i = 0; i < up.size(); ++i) up[i] *= act(gate[i]);
      } else {
        for (double& v : up) v = act(v);
      }
      return project(base, 6, up);
    }

    Vector mlps(int64_t b, const Vector& h) {
      if (!d.o.routed) return mlp(own(b), h);
      const Weights w = d.router(b);
      Vector product(static_cast<size_t>(w.outputs)), p(experts), y(hidden);
      for (size_t e = 0; e < product.size(); ++e) {
        for (size_t i = 0; i < hidden; ++i) product[e] += h[i] * w.value(static_cast<int64_t>(i), static_cast<int64_t>(e));
      }
      double total = 0;
      for (size_t e = 0; e < experts; ++e) total += p[e] = std::exp(product[e]);
      std::vector<size_t> order(experts);
      std::iota(order.begin(), order.end(), size_t{0});
      std::sort(order.begin(), order.end(), [&](size_t x, size_t z) { return p[x] > p[z]; });
      margin = std::min(margin, (p[order[active - 1]] - p[order[active]]) / p[order[active - 1]]);
      double chosen = 0;
      for (size_t i = 0; i < active; ++i) chosen += p[order[i]];
      const auto add = [&](const Vector& made, double weight) {
        for (size_t i = 0; i < hidden; ++i) y[i] += made[i] * weight;
      };
      for (size_t i = 0; i < active; ++i) {
        const size_t e = order[i];
        add(mlp(of_expert(b, static_cast<int64_t>(e)), h), p[e] / (b == 0 ? chosen : total));
      }
      if (d.has_own(b)) add(mlp(own(b), h), 1 / (1 + std::exp(-product[experts])));
      return y;
    }

    void token(int64_t id, std::vector<double>& out) {
      const Weights table = d.table();
      Vector x(hidden);
      for (int64_t i = 0; i < hidden; ++i) {
        x[static_cast<size_t>(i)] = table.value(i, id) * static_cast<double>(d.model.embedding_scale);
        if (d.o.learned) {
          const size_t at = static_cast<size_t>(position) * static_cast<size_t>(hidden) + static_cast<size_t>(i);
          x[static_cast<size_t>(i)] += static_cast<double>(d.position_[at]);
        }
      }
      const auto add = [&](Vector y) {
        if (d.o.biased) y = norm(y, hidden);
        for (size_t i = 0; i < hidden; ++i) x[i] += y[i] * static_cast<double>(d.model.residual_scale);
      };
      for (int64_t b = 0; b < blocks; ++b) {
        const Vector before = norm(x, hidden);
        add(attention(b, before));
        const Vector h = d.o.learned ? before : norm(x, hidden);
        add(mlps(b, h));
      }
      const Vector h = norm(x, hidden);
      for (int64_t w = 0; w < vocabulary; ++w) {
        double s = 0;
        for (int64_t i = 0; i < hidden; ++i) s += h[static_cast<size_t>(i)] * table.value(i, w);
        if (d.o.learned) s = s * static_cast<double>(d.model.logit_scale) + static_cast<double>(d.noise_[static_cast<size_t>(w)]);
        out.push_back(d.o.biased ? 30 * std::tanh(s / 30) : s);
      }
      read += static_cast<double>(vocabulary * hidden);
      position += 1;
    }

    double position = 0;
  };

  Options o;
  std::vector<std::unique_ptr<Packed>> packed_;
  std::vector<std::unique_ptr<Member>> members_;
  std::vector<uint32_t> by_id_;
  std::vector<std::vector<float>> bias_;
  std::vector<acttail_block> block_;
  std::vector<acttail_mlp> expert_[blocks];
  std::vector<float> norm_, shift_, score_, noise_, position_;
  float inv_freq_[half] = {1.0f, 0.1f, 0.01f};
  acttail_rope rope_{};
};

}  // namespace decoder
