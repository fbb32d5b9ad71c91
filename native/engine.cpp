#include "engine.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace acttail {

namespace {

int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

int64_t largest_input(const acttail_model& m) {
  return std::max({m.hidden, m.intermediate, m.heads * m.head_dim});
}

}  // namespace

Worker::Worker(const acttail_model& m)
    : selection(largest_input(m)),
      stream(static_cast<size_t>(padded(m.hidden))),
      normed(static_cast<size_t>(padded(m.hidden))),
      inner(static_cast<size_t>(padded(2 * m.intermediate))),
      heads(static_cast<size_t>(padded(m.head_dim) * (m.heads / m.kv_heads))),
      out(static_cast<size_t>(std::max(padded(m.hidden), padded(m.head_dim) * (m.heads / m.kv_heads)))),
      key(static_cast<size_t>(padded(m.head_dim)) * 4),
      value(static_cast<size_t>(padded(m.head_dim)) * 4) {}

}  // namespace acttail

using acttail::Part;
using acttail::Worker;

enum Stage { kQkv = 0, kOutput = 1, kGateUp = 2, kDown = 3 };

acttail_engine::acttail_engine(const acttail_model& m, int threads)
    : model(m),
      blocks(m.block, m.block + m.blocks),
      ropes(m.rope, m.rope + m.ropes),
      kernels(acttail::kernels()),
      pool(threads),
      widest(0) {
  for (int t = 0; t < threads; ++t) workers.push_back(std::make_unique<Worker>(m));
  for (const acttail_block& b : blocks) {
    for (const acttail_fused* f : {&b.qkv, &b.o, &b.gate_up, &b.down}) {
      widest = std::max(widest, f->matrix.columns);
    }
  }
  for (auto& p : partial) p.resize(static_cast<size_t>(widest * threads));
  attended.resize(static_cast<size_t>(acttail::padded(m.heads * m.head_dim)));
  for (const acttail_rope& r : ropes) {
    cosines.emplace_back(static_cast<size_t>(r.half));
    sines.emplace_back(static_cast<size_t>(r.half));
  }
}

// This thread's share of W x: an equal part of the kept rows, into its own partial sums.
void acttail_engine::project(int t, Worker& w, const acttail_fused& fused, const float* x, int stage) {
  const auto& parts = w.selection.choose(kernels, fused, x);
  if (t == 0) w.read += w.selection.weights();
  float* y = partial[stage].data() + t * widest;
  std::fill(y, y + fused.matrix.columns, 0.0f);
  const int64_t threads = pool.threads();
  for (const Part& part : parts) {
    const int64_t first = part.rows.count * t / threads, last = part.rows.count * (t + 1) / threads;
    if (first == last) continue;
    acttail::Rows mine{part.rows.index ? part.rows.index + first : nullptr, part.rows.x + first,
                       last - first, part.rows.first + first};
    kernels.add_rows(acttail::as_matrix(fused.matrix), mine, part.begin, part.end, y, 1, 0);
  }
}

// The sum over threads of columns begin .. begin + n, with the bias.
void acttail_engine::collect(const acttail_fused& fused, int stage, int64_t begin, int64_t n,
                             float* out) const {
  std::memcpy(out, partial[stage].data() + begin, sizeof(float) * static_cast<size_t>(n));
  for (int t = 1; t < pool.threads(); ++t) {
    kernels.accumulate(out, partial[stage].data() + t * widest + begin, n);
  }
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
}

void acttail_engine::add_to_stream(Worker& w, const acttail_fused& fused, int stage,
                                   const acttail_norm& n) {
  collect(fused, stage, 0, model.hidden, w.out.data());
  norm(n, w.out.data(), model.hidden, w.out.data());
  kernels.accumulate(w.stream.data(), w.out.data(), model.hidden);
}

// The query heads of this thread. It makes the key and value they need itself; the thread with a group's
// first query head also writes them into the cache, where nobody reads them before the next token.
void acttail_engine::attention(int t, Worker& w, const acttail_block& b, int64_t index,
                               acttail_cache& cache, int64_t position) {
  const int64_t d = model.head_dim, per_kv = model.heads / model.kv_heads;
  const int64_t first = model.heads * t / pool.threads();
  const int64_t last = model.heads * (t + 1) / pool.threads();
  acttail::KvHead kv{};
  kv.format = cache.format;
  kv.width = cache.width;
  kv.length = position + 1;
  kv.first = b.window > 0 ? std::max<int64_t>(0, position + 1 - b.window) : 0;
  kv.last_key = w.key.data();
  kv.last_value = w.value.data();
  w.scores.resize(static_cast<size_t>(cache.capacity * acttail::kMostHeads));
  const auto turn = [&](const acttail_norm& n, int64_t offset, float* head) {
    std::fill(head, head + cache.width, 0.0f);
    collect(b.qkv, kQkv, offset, d, head);
    norm(n, head, d, head);
    if (b.rope >= 0) {
      kernels.rope(head, cosines[static_cast<size_t>(b.rope)].data(),
                   sines[static_cast<size_t>(b.rope)].data(),
                   ropes[static_cast<size_t>(b.rope)].half);
    }
  };
  const int64_t bytes = cache.width * acttail::kv_bytes(cache.format);
  float* const heads = w.heads.data();
  int64_t count = 0;
  for (int64_t h = first; h < last; h += count) {
    const int64_t group = h / per_kv;
    count = std::min(last, (group + 1) * per_kv) - h;
    turn(b.k_norm, b.k_offset + group * d, heads);
    kernels.encode_kv(cache.format, heads, cache.width, w.key.data(), &kv.last_key_scale);
    std::fill(heads, heads + cache.width, 0.0f);
    collect(b.qkv, kQkv, b.v_offset + group * d, d, heads);
    kernels.encode_kv(cache.format, heads, cache.width, w.value.data(), &kv.last_value_scale);
    kv.keys = cache.keys(index, group);
    kv.values = cache.values(index, group);
    kv.key_scale = cache.key_scales(index, group);
    kv.value_scale = cache.value_scales(index, group);
    if (h == group * per_kv) {
      std::memcpy(cache.keys(index, group) + position * bytes, w.key.data(),
                  static_cast<size_t>(bytes));
      std::memcpy(cache.values(index, group) + position * bytes, w.value.data(),
                  static_cast<size_t>(bytes));
      if (kv.key_scale != nullptr) {
        cache.key_scales(index, group)[position] = kv.last_key_scale;
        cache.value_scales(index, group)[position] = kv.last_value_scale;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      turn(b.q_norm, b.q_offset + (h + i) * d, heads + i * cache.width);
    }
    kernels.attend(kv, heads, count, model.attention_scale, model.attention_softcap,
                   w.scores.data(), w.out.data());
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(attended.data() + (h + i) * d, w.out.data() + i * cache.width,
                  sizeof(float) * static_cast<size_t>(d));
    }
  }
}

void acttail_engine::token(int t, acttail_cache& cache, int64_t token, int64_t position,
                           float* logits) {
  Worker& w = *workers[static_cast<size_t>(t)];
  acttail::Barrier& barrier = pool.barrier();
  kernels.decode_dot_row(acttail::as_matrix(model.embedding), token, w.stream.data());
  if (model.embedding_scale != 1.0f) {
    for (auto& v : w.stream) v *= model.embedding_scale;
  }
  for (int64_t i = 0; i < model.blocks; ++i) {
    const acttail_block& b = blocks[static_cast<size_t>(i)];
    norm(b.input_norm, w.stream.data(), model.hidden, w.normed.data());
    project(t, w, b.qkv, w.normed.data(), kQkv);
    barrier.wait();
    attention(t, w, b, i, cache, position);
    barrier.wait();
    project(t, w, b.o, attended.data(), kOutput);
    barrier.wait();
    add_to_stream(w, b.o, kOutput, b.attention_norm);
    norm(b.mlp_norm, w.stream.data(), model.hidden, w.normed.data());
    project(t, w, b.gate_up, w.normed.data(), kGateUp);
    barrier.wait();
    float* up = w.inner.data();
    collect(b.gate_up, kGateUp, b.up_offset, model.intermediate, up);
    if (b.gate_offset >= 0) {
      float* gate = up + model.intermediate;
      collect(b.gate_up, kGateUp, b.gate_offset, model.intermediate, gate);
      kernels.activate(gate, up, model.intermediate, model.activation, up);
    } else {
      kernels.activate(up, nullptr, model.intermediate, model.activation, up);
    }
    project(t, w, b.down, up, kDown);
    barrier.wait();
    add_to_stream(w, b.down, kDown, b.output_norm);
  }
  if (logits == nullptr) return;
  norm(model.final_norm, w.stream.data(), model.hidden, w.normed.data());
  const int64_t first = model.vocabulary * t / pool.threads();
  const int64_t last = model.vocabulary * (t + 1) / pool.threads();
  kernels.dot_rows(acttail::as_matrix(model.head), w.normed.data(), first, last, logits);
  if (model.logit_softcap > 0) kernels.softcap(logits + first, last - first, model.logit_softcap);
  if (t == 0) w.read += static_cast<double>(model.vocabulary * model.hidden);
}

extern "C" {

acttail_engine* acttail_engine_new(const acttail_model* model, int threads) {
  if (model == nullptr || threads < 1 || threads > 256 || model->block == nullptr ||
      model->blocks < 1 || model->hidden < 1 || model->heads < 1 || model->kv_heads < 1 ||
      model->heads % model->kv_heads != 0 || model->vocabulary < 1) {
    return nullptr;
  }
  try {
    return new acttail_engine(*model, threads);
  } catch (const std::exception&) {
    return nullptr;
  }
}

void acttail_engine_free(acttail_engine* engine) { delete engine; }

int acttail_engine_forward(acttail_engine* engine, acttail_cache* cache, const int64_t* tokens,
                           int64_t count, int all_logits, float* logits, double* read) {
  if (engine == nullptr || cache == nullptr || tokens == nullptr || count < 1 ||
      cache->length + count > cache->capacity || cache->blocks != engine->model.blocks) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= engine->model.vocabulary) return ACTTAIL_BAD_ARGUMENT;
  }
  engine->workers[0]->read = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = cache->length;
    for (size_t r = 0; r < engine->ropes.size(); ++r) {
      const acttail_rope& rope = engine->ropes[r];
      for (int64_t j = 0; j < rope.half; ++j) {
        const float angle = static_cast<float>(position) * rope.inv_freq[j];
        engine->cosines[r][static_cast<size_t>(j)] = std::cos(angle) * rope.scale;
        engine->sines[r][static_cast<size_t>(j)] = std::sin(angle) * rope.scale;
      }
    }
    float* out = nullptr;
    if (logits != nullptr && (all_logits || i + 1 == count)) {
      out = logits + (all_logits ? i * engine->model.vocabulary : 0);
    }
    auto run = [&](int t) { engine->token(t, *cache, tokens[i], position, out); };
    engine->pool.run(run);
    cache->length = position + 1;
  }
  if (read != nullptr) *read = engine->workers[0]->read;
  return ACTTAIL_OK;
}

int acttail_decode_rows(const acttail_matrix* m, int64_t first, int64_t last, int64_t begin,
                        int64_t end, int as_float, void* out, int threads) {
  if (m == nullptr || out == nullptr || first < 0 || last < first || last > m->d_in || begin < 0 ||
      end < begin || end > m->columns || threads < 1) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  const acttail::Kernels& kernels = acttail::kernels();
  const int64_t width = end - begin;
  bool failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* row = new (std::nothrow) float[static_cast<size_t>(m->columns + 64)];
    if (row == nullptr) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(static)
    for (int64_t i = first; i < last; ++i) {
      if (row == nullptr) continue;
      kernels.decode_row(acttail::as_matrix(*m), i, row);
      if (as_float) {
        std::memcpy(static_cast<float*>(out) + (i - first) * width, row + begin,
                    sizeof(float) * static_cast<size_t>(width));
        continue;
      }
      uint16_t* to = static_cast<uint16_t*>(out) + (i - first) * width;
      const int64_t whole = width / 16 * 16;
      kernels.encode_kv(acttail::kKvBf16, row + begin, whole, to, nullptr);
      if (whole < width) {
        float tail[16] = {};
        uint16_t rounded[16];
        std::memcpy(tail, row + begin + whole, sizeof(float) * static_cast<size_t>(width - whole));
        kernels.encode_kv(acttail::kKvBf16, tail, 16, rounded, nullptr);
        std::memcpy(to + whole, rounded, sizeof(uint16_t) * static_cast<size_t>(width - whole));
      }
    }
    delete[] row;
  }
  return failed ? ACTTAIL_OUT_OF_MEMORY : ACTTAIL_OK;
}

int acttail_add_rows(const acttail_matrix* m, const int32_t* index, const float* x, int64_t count,
                     int64_t begin, int64_t end, float* y, int64_t batch, int64_t stride) {
  if (m == nullptr || (x == nullptr && count > 0) || y == nullptr || count < 0 || count > m->d_in || begin < 0 ||
      end > m->columns || begin % acttail::kBlock || end % acttail::kBlock || batch < 1 ||
      batch > 8) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  const acttail::Rows rows{index, x, count, 0};
  acttail::kernels().add_rows(acttail::as_matrix(*m), rows, begin, end, y, batch, stride);
  return ACTTAIL_OK;
}

int acttail_dot_rows(const acttail_matrix* m, const float* x, float* y) {
  if (m == nullptr || x == nullptr || y == nullptr) return ACTTAIL_BAD_ARGUMENT;
  acttail::kernels().dot_rows(acttail::as_matrix(*m), x, 0, m->d_in, y);
  return ACTTAIL_OK;
}

}  // extern "C"
