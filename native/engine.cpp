#include "engine.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "batch.hpp"
#include "gather.hpp"

namespace acttail {

namespace {

int64_t largest_input(const acttail_model& m) {
  return std::max({m.hidden, m.intermediate, m.heads * m.head_dim});
}

}  // namespace

Worker::Worker(const acttail_model& m, int64_t most_experts, int64_t most_visits)
    : selection(largest_input(m)),
      route(most_experts, most_visits),
      stream(static_cast<size_t>(padded(m.hidden))),
      normed(static_cast<size_t>(padded(m.hidden))),
      inner(static_cast<size_t>(padded(2 * m.intermediate))),
      heads(static_cast<size_t>(padded(m.head_dim) * (m.heads / m.kv_heads))),
      out(static_cast<size_t>(std::max(padded(m.hidden), padded(m.head_dim) * (m.heads / m.kv_heads)))),
      added(static_cast<size_t>(padded(m.hidden))),
      key(static_cast<size_t>(padded(m.head_dim)) * 4),
      value(static_cast<size_t>(padded(m.head_dim)) * 4),
      dot(static_cast<size_t>(dot_scratch(padded(m.hidden)))),
      masked(static_cast<size_t>(padded(m.hidden))) {}

Angles::Angles(const std::vector<acttail_rope>& ropes) {
  for (const acttail_rope& r : ropes) {
    cosines.emplace_back(static_cast<size_t>(r.half));
    sines.emplace_back(static_cast<size_t>(r.half));
  }
}

void Angles::turn(const std::vector<acttail_rope>& ropes, int64_t position) {
  for (size_t r = 0; r < ropes.size(); ++r) {
    for (int64_t j = 0; j < ropes[r].half; ++j) {
      const float angle = static_cast<float>(position) * ropes[r].inv_freq[j];
      cosines[r][static_cast<size_t>(j)] = std::cos(angle) * ropes[r].scale;
      sines[r][static_cast<size_t>(j)] = std::sin(angle) * ropes[r].scale;
    }
  }
}

}  // namespace acttail

using acttail::Part;
using acttail::Worker;

// Columns of the head that are taken at a time: their sums stay near while all kept rows are added up, and a
// row's run is still long enough for memory (16 KB in int8).
constexpr int64_t kHeadColumns = 16384;

enum Stage { kQkv = 0, kOutput = 1, kGateUp = 2, kDown = 3 };

acttail_engine::acttail_engine(const acttail_model& m, int threads)
    : model(m),
      blocks(m.block, m.block + m.blocks),
      ropes(m.rope, m.rope + m.ropes),
      kernels(acttail::kernels()),
      pool(threads),
      widest(0),
      most_experts(0),
      most_visits(1),
      angles(ropes) {
  int64_t routed = 0;
  const auto widen = [&](const acttail_fused& f) { widest = std::max(widest, acttail::columns_of(f)); };
  for (const acttail_block& b : blocks) {
    widen(b.qkv), widen(b.o), widen(b.mlp.gate_up), widen(b.mlp.down);
    for (int64_t e = 0; e < b.experts; ++e) widen(b.expert[e].gate_up), widen(b.expert[e].down);
    if (b.experts > 0) routed = std::max(routed, b.router.rows);
    most_experts = std::max(most_experts, b.experts);
    most_visits = std::max(most_visits, acttail::visits_of(b));
  }
  products.resize(static_cast<size_t>(routed));
  for (int t = 0; t < threads; ++t) workers.push_back(std::make_unique<Worker>(m, most_experts, most_visits));
  for (int stage = 0; stage < 4; ++stage) partial[stage].resize(static_cast<size_t>(stride(stage) * threads));
  head_selection = m.head_input;
  if (m.head_input.matrices > 0) {
    head_sums.resize(static_cast<size_t>(acttail::columns_of(m.head_input)));
  } else {
    // The selection sees a matrix of as many rows; nobody reads it.
    head_selection.matrices = 1;
    head_selection.matrix[0] = acttail_matrix{};
    head_selection.matrix[0].rows = m.hidden;
    head_selection.matrix[0].columns = head_selection.segment[0].end;
    head_selection.segment[0].dense_kernel = 1;
  }
  attended.resize(static_cast<size_t>(acttail::padded(m.heads * m.head_dim)));
}

acttail_engine::~acttail_engine() = default;

// Room for the attention to `positions`, before threads that may not allocate need it.
void acttail_engine::reserve(int64_t positions) {
  const size_t needed = static_cast<size_t>(positions * acttail::kMostHeads);
  for (auto& w : workers) {
    if (w->scores.size() < needed) w->scores.resize(std::max(needed, 2 * w->scores.size()));
  }
}

int64_t acttail_engine::stride(int stage) const { return stage < kGateUp ? widest : most_visits * widest; }

// This thread's share of W x: an equal part of the kept rows, into its own partial sums.
void acttail_engine::project(int t, Worker& w, const acttail_fused& fused, const float* x, int stage, int64_t visit) {
  const auto& parts = w.selection.choose(kernels, fused, x);
  if (t == 0) w.read += w.selection.weights();
  float* y = partial[stage].data() + t * stride(stage) + visit * widest;
  std::fill(y, y + acttail::columns_of(fused), 0.0f);
  const int64_t threads = pool.threads();
  for (const Part& part : parts) {
    const int64_t first = part.rows.count * t / threads, last = part.rows.count * (t + 1) / threads;
    if (first == last) continue;
    acttail::Rows mine{part.rows.index ? part.rows.index + first : nullptr, part.rows.x + first,
                       last - first, part.rows.first + first};
    kernels.add_rows(*part.matrix, mine, part.begin, part.end, y + part.at);
  }
}

// The sum over threads of columns begin .. begin + n, with the bias.
void acttail_engine::collect(const acttail_fused& fused, acttail::Sums sums, int64_t begin, int64_t n,
                             float* out) const {
  std::memcpy(out, sums.first + begin, sizeof(float) * static_cast<size_t>(n));
  for (int t = 1; t < pool.threads(); ++t) kernels.accumulate(out, sums.first + t * sums.stride + begin, n);
  if (fused.bias != nullptr) kernels.accumulate(out, fused.bias + begin, n);
}

void acttail_engine::norm(const acttail_norm& n, const float* x, int64_t width, float* y) const {
  if (n.weight == nullptr) {
    if (x != y) std::memcpy(y, x, sizeof(float) * static_cast<size_t>(width));
  } else if (model.layer_norm) {
    kernels.layer_norm(x, n.weight, n.bias, width, model.norm_eps, y);
  } else {
    kernels.rms_norm(x, n.weight, width, model.norm_eps, y);
  }
  // Written so that NaN stays: a broken stream must remain visible.
  if (n.rectified) {
    for (int64_t i = 0; i < width; ++i) y[i] = y[i] < 0.0f ? 0.0f : y[i];
  }
}

void acttail_engine::add_to_stream(const acttail_norm& n, float* out, float* stream) const {
  norm(n, out, model.hidden, out);
  if (model.residual_scale != 1.0f) {
    for (int64_t i = 0; i < model.hidden; ++i) out[i] *= model.residual_scale;
  }
  kernels.accumulate(stream, out, model.hidden);
}

void acttail_engine::activate(const acttail_mlp& mlp, acttail::Sums sums, float* inner) const {
  const int64_t n = mlp.intermediate;
  collect(mlp.gate_up, sums, mlp.up_offset, n, inner);
  if (mlp.gate_offset >= 0) {
    float* gate = inner + n;
    collect(mlp.gate_up, sums, mlp.gate_offset, n, gate);
    kernels.activate(gate, inner, n, model.activation, inner);
  } else {
    kernels.activate(inner, nullptr, n, model.activation, inner);
  }
}

void acttail_engine::add_visit(const acttail::Visit& visit, bool first, acttail::Sums sums, float* room,
                               float* out) const {
  float* const made = first ? out : room;
  collect(visit.mlp->down, sums, 0, model.hidden, made);
  if (visit.weight != 1.0f) {
    for (int64_t i = 0; i < model.hidden; ++i) made[i] *= visit.weight;
  }
  if (!first) kernels.accumulate(out, room, model.hidden);
}

void acttail_engine::embed(int64_t token, int64_t position, std::vector<float>& stream) const {
  if (model.embedding.data != nullptr) {
    kernels.decode_dot_row(model.embedding, token, stream.data());
  } else {
    // Every thread for itself, as with a row: what the first has waited for the others find in a cache that they share.
    acttail::gather_column(model.head_input.matrix[0], token, stream.data());
  }
  if (model.embedding_scale != 1.0f) {
    for (auto& v : stream) v *= model.embedding_scale;
  }
  if (model.position != nullptr) {
    kernels.accumulate(stream.data(), model.position + position * model.hidden, model.hidden);
  }
}

void acttail_engine::finish_logits(float* logits, int64_t first, int64_t last) const {
  if (model.logit_scale != 1.0f) {
    for (int64_t i = first; i < last; ++i) logits[i] *= model.logit_scale;
  }
  if (model.head_bias != nullptr) kernels.accumulate(logits + first, model.head_bias + first, last - first);
  if (model.logit_softcap > 0) kernels.softcap(logits + first, last - first, model.logit_softcap);
}

namespace {

// One head of q or k: collected, normed, rotated.
void turned(const acttail_engine& e, const acttail_block& b, const acttail::Position& p, const acttail_norm& n,
            int64_t offset, float* head) {
  const int64_t d = e.model.head_dim;
  std::fill(head, head + p.cache.width, 0.0f);
  e.collect(b.qkv, p.qkv, offset, d, head);
  e.norm(n, head, d, head);
  if (b.rope < 0) return;
  const size_t r = static_cast<size_t>(b.rope);
  e.kernels.rope(head, p.angles.cosines[r].data(), p.angles.sines[r].data(), e.ropes[r].half);
}

}  // namespace

void acttail_engine::make_entry(Worker& w, const acttail_block& b, const acttail::Position& p, int64_t group,
                                float* key_scale, float* value_scale) const {
  const int64_t d = model.head_dim, width = p.cache.width;
  float* const head = w.heads.data();
  turned(*this, b, p, b.k_norm, b.k_offset + group * d, head);
  kernels.encode_kv(p.cache.format, head, width, w.key.data(), key_scale);
  std::fill(head, head + width, 0.0f);
  collect(b.qkv, p.qkv, b.v_offset + group * d, d, head);
  kernels.encode_kv(p.cache.format, head, width, w.value.data(), value_scale);
}

void acttail_engine::keep_entry(const Worker& w, int64_t block, const acttail::Position& p, int64_t group,
                                float key_scale, float value_scale) const {
  acttail_cache& cache = p.cache;
  const size_t bytes = static_cast<size_t>(cache.position_bytes());
  std::memcpy(cache.key(block, group, p.index), w.key.data(), bytes);
  std::memcpy(cache.value(block, group, p.index), w.value.data(), bytes);
  if (!cache.scaled()) return;
  *cache.key_scale(block, group, p.index) = key_scale;
  *cache.value_scale(block, group, p.index) = value_scale;
}

void acttail_engine::attend(Worker& w, const acttail_block& b, int64_t block, const acttail::Position& p,
                            int64_t first, int64_t count, acttail::KvHead kv) const {
  acttail_cache& cache = p.cache;
  const int64_t d = model.head_dim, group = first / (model.heads / model.kv_heads);
  kv.format = cache.format;
  kv.width = cache.width;
  kv.length = p.index + 1;
  kv.first = b.window > 0 ? std::max<int64_t>(0, p.index + 1 - b.window) : 0;
  kv.pages = cache.starts.data();
  kv.keys = cache.keys_at(block, group);
  kv.values = kv.keys + cache.slab();
  kv.scaled = cache.scaled();
  kv.key_scales = cache.scales_at(block, group);
  kv.value_scales = kv.key_scales + acttail::kPage * static_cast<int64_t>(sizeof(float));
  float* const heads = w.heads.data();
  for (int64_t i = 0; i < count; ++i) {
    turned(*this, b, p, b.q_norm, b.q_offset + (first + i) * d, heads + i * cache.width);
  }
  kernels.attend(kv, heads, count, model.attention_scale, model.attention_softcap, w.scores.data(), w.out.data());
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(p.attended + (first + i) * d, w.out.data() + i * cache.width, sizeof(float) * static_cast<size_t>(d));
  }
}

// The query heads of this thread. It makes the key and value they need itself; the thread with a group's
// first query head also writes them into the cache, where nobody reads them before the next token.
void acttail_engine::attention(int t, Worker& w, const acttail_block& b, int64_t block,
                               const acttail::Position& p) {
  const int64_t per_kv = model.heads / model.kv_heads;
  const int64_t last = model.heads * (t + 1) / pool.threads();
  int64_t count = 0;
  for (int64_t h = model.heads * t / pool.threads(); h < last; h += count) {
    const int64_t group = h / per_kv;
    count = std::min(last, (group + 1) * per_kv) - h;
    acttail::KvHead kv{};
    make_entry(w, b, p, group, &kv.last_key_scale, &kv.last_value_scale);
    kv.last_key = w.key.data();
    kv.last_value = w.value.data();
    if (h == group * per_kv) keep_entry(w, block, p, group, kv.last_key_scale, kv.last_value_scale);
    attend(w, b, block, p, h, count, kv);
  }
}

// What a block's MLPs, or those of them that the router chooses, make of w.normed, into w.out. Every thread chooses
// for itself, of products that are shared out: a router of 128 experts is as large as half an expert in int4.
void acttail_engine::mlps(int t, Worker& w, const acttail_block& b) {
  acttail::Barrier& barrier = pool.barrier();
  if (b.experts > 0) {
    const int64_t rows = b.router.rows, threads = pool.threads();
    kernels.dot_rows(b.router, w.normed.data(), rows * t / threads, rows * (t + 1) / threads, products.data(),
                     w.dot.data());
    barrier.wait();
    w.route.choose(b, products.data());
  } else {
    w.route.plain(b);
  }
  int64_t at = 0;
  for (const acttail::Visit& v : w.route) project(t, w, v.mlp->gate_up, w.normed.data(), kGateUp, at++);
  barrier.wait();
  at = 0;
  for (const acttail::Visit& v : w.route) {
    activate(*v.mlp, sums(kGateUp, at), w.inner.data());
    project(t, w, v.mlp->down, w.inner.data(), kDown, at++);
  }
  barrier.wait();
  at = 0;
  for (const acttail::Visit& v : w.route) {
    add_visit(v, at == 0, sums(kDown, at), w.added.data(), w.out.data());
    ++at;
  }
}

void acttail_engine::token(int t, acttail_cache& cache, int64_t token, int64_t position,
                           float* logits) {
  Worker& w = *workers[static_cast<size_t>(t)];
  acttail::Barrier& barrier = pool.barrier();
  const acttail::Position here{cache, position, angles, sums(kQkv), attended.data()};
  embed(token, position, w.stream);
  for (int64_t i = 0; i < model.blocks; ++i) {
    const acttail_block& b = blocks[static_cast<size_t>(i)];
    norm(b.input_norm, w.stream.data(), model.hidden, w.normed.data());
    project(t, w, b.qkv, w.normed.data(), kQkv);
    barrier.wait();
    attention(t, w, b, i, here);
    barrier.wait();
    project(t, w, b.o, attended.data(), kOutput);
    barrier.wait();
    if (b.parallel) norm(b.mlp_norm, w.stream.data(), model.hidden, w.normed.data());
    collect(b.o, sums(kOutput), 0, model.hidden, w.out.data());
    add_to_stream(b.attention_norm, w.out.data(), w.stream.data());
    if (!b.parallel) norm(b.mlp_norm, w.stream.data(), model.hidden, w.normed.data());
    mlps(t, w, b);
    add_to_stream(b.output_norm, w.out.data(), w.stream.data());
  }
  if (logits == nullptr) return;
  norm(model.final_norm, w.stream.data(), model.hidden, w.normed.data());
  head(t, w, logits);
}

// This thread's part of the logits. Outputs are shared out, not kept rows: runs stay long, and no sums are
// left to be joined.
void acttail_engine::head(int t, Worker& w, float* logits) {
  const int64_t threads = pool.threads(), vocabulary = model.vocabulary;
  int64_t first = vocabulary * t / threads, last = vocabulary * (t + 1) / threads;
  if (model.head_input.matrices == 0) {
    const float* x = w.normed.data();
    if (model.head_input.segments > 0) {
      const auto& parts = w.selection.choose(kernels, head_selection, x);
      std::memcpy(w.masked.data(), parts.begin()->rows.x, sizeof(float) * static_cast<size_t>(model.hidden));
      x = w.masked.data();
    }
    kernels.dot_rows(model.head, x, first, last, logits, w.dot.data());
    if (t == 0) w.read += static_cast<double>(vocabulary * model.hidden);
  } else {
    const acttail_matrix& m = model.head_input.matrix[0];
    const auto& parts = w.selection.choose(kernels, model.head_input, w.normed.data());
    if (t == 0) w.read += w.selection.weights();
    const int64_t block = acttail::kFormatTraits[m.format].block, blocks = m.columns / block;
    first = blocks * t / threads * block;
    const int64_t end = blocks * (t + 1) / threads * block;
    last = std::min(end, vocabulary);
    float* const sums = head_sums.data();
    for (int64_t at = first; at < end; at += kHeadColumns) {
      const int64_t to = std::min(at + kHeadColumns, end);
      std::fill(sums + at, sums + to, 0.0f);
      for (const Part& part : parts) kernels.add_rows(m, part.rows, at, to, sums);
    }
    first = std::min(first, vocabulary);
    std::memcpy(logits + first, sums + first, sizeof(float) * static_cast<size_t>(last - first));
  }
  finish_logits(logits, first, last);
}

// One token of a sequence that has room for it: everything that is the same for all threads, then the token.
void acttail_engine::step(acttail_cache& cache, int64_t token, float* logits) {
  const int64_t position = cache.length;
  angles.turn(ropes, position);
  auto run = [&](int t) { this->token(t, cache, token, position, logits); };
  pool.run(run);
  cache.length = position + 1;
}
