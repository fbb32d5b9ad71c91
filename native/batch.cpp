#include "batch.hpp"

#include <algorithm>
#include <cstring>

namespace acttail {

namespace {

// Rows of an output-major head that are taken at a time: what one row's logits have read, the next ones find near.
constexpr int64_t kHeadRows = 32;
// Columns of a head with rows of its own that are taken at a time; see engine.cpp.
constexpr int64_t kHeadColumns = 16384;

// Whether the lanes' parts are of the same columns, so that each can be read for all of them.
bool alike(const Parts& a, const Parts& b) {
  if (a.end() - a.begin() != b.end() - b.begin()) return false;
  return std::equal(a.begin(), a.end(), b.begin(), [](const Part& x, const Part& y) {
    return x.matrix == y.matrix && x.begin == y.begin && x.end == y.end;
  });
}

// A thread's share of a list: the same whether its vector is alone or not.
Rows share(const Rows& rows, int64_t t, int64_t threads) {
  const int64_t first = rows.count * t / threads, last = rows.count * (t + 1) / threads;
  return {rows.index ? rows.index + first : nullptr, rows.x + first, last - first, rows.first + first};
}

}  // namespace

Lane::Lane(const acttail_engine& e)
    : selection(std::max({e.model.hidden, e.model.intermediate, e.model.heads * e.model.head_dim})),
      angles(e.ropes),
      stream(static_cast<size_t>(padded(e.model.hidden))),
      normed(static_cast<size_t>(padded(e.model.hidden))),
      inner(static_cast<size_t>(padded(2 * e.model.intermediate))),
      attended(static_cast<size_t>(padded(e.model.heads * e.model.head_dim))),
      out(static_cast<size_t>(padded(e.model.hidden))),
      masked(static_cast<size_t>(padded(e.model.hidden))) {}

Batch::Batch(acttail_engine& engine)
    : engine_(engine),
      partial_(static_cast<size_t>(engine.pool.threads() * kMostTogether * engine.widest)),
      scratch_(static_cast<size_t>(engine.pool.threads() * kTogetherScratch)) {
  for (int64_t i = 0; i < kMostTogether; ++i) lanes_.push_back(std::make_unique<Lane>(engine));
  if (engine.model.head_input.matrices > 0) {
    head_sums_.resize(static_cast<size_t>(kMostTogether * columns_of(engine.model.head_input)));
  }
}

void Batch::run(Row* rows, int64_t count) {
  rows_ = rows;
  count_ = count;
  for (int64_t i = 0; i < count; ++i) {
    lanes_[static_cast<size_t>(i)]->angles.turn(engine_.ropes, rows[i].position);
    rows[i].read = 0;
  }
  auto work = [&](int t) { this->thread(t); };
  engine_.pool.run(work);
}

Position Batch::position(int64_t i) {
  Lane& lane = *lanes_[static_cast<size_t>(i)];
  return {*rows_[i].cache, rows_[i].position, lane.angles, sums(i), lane.attended.data()};
}

void Batch::choose(Lane& lane, const acttail_fused& fused, const float* x, int64_t row) {
  lane.parts = &lane.selection.choose(engine_.kernels, fused, x);
  rows_[row].read += lane.selection.weights();
}

// This thread's share of every lane's W x, into its own partial sums.
void Batch::project(int t, const acttail_fused& fused) {
  float* const y = partial_.data() + t * kMostTogether * engine_.widest;
  bool joint = count_ > 1;
  for (int64_t i = 0; i < count_; ++i) {
    float* const own = y + i * engine_.widest;
    std::fill(own, own + columns_of(fused), 0.0f);
    joint = joint && alike(*lanes_[0]->parts, *lanes_[static_cast<size_t>(i)]->parts);
  }
  const int64_t threads = engine_.pool.threads();
  const auto mine = [&](int64_t i, int64_t part) {
    return share(lanes_[static_cast<size_t>(i)]->parts->begin()[part].rows, t, threads);
  };
  for (int64_t p = 0; joint && p < lanes_[0]->parts->end() - lanes_[0]->parts->begin(); ++p) {
    const Part& part = lanes_[0]->parts->begin()[p];
    Rows rows[kMostTogether];
    for (int64_t i = 0; i < count_; ++i) rows[i] = mine(i, p);
    engine_.kernels.add_rows_together(*part.matrix, rows, count_, part.begin, part.end, y + part.at, engine_.widest,
                                      scratch_.data() + t * kTogetherScratch);
  }
  for (int64_t i = 0; !joint && i < count_; ++i) {
    const Parts& parts = *lanes_[static_cast<size_t>(i)]->parts;
    for (int64_t p = 0; p < parts.end() - parts.begin(); ++p) {
      const Part& part = parts.begin()[p];
      const Rows rows = mine(i, p);
      if (rows.count > 0) {
        engine_.kernels.add_rows(*part.matrix, rows, part.begin, part.end, y + i * engine_.widest + part.at);
      }
    }
  }
}

// All keys and values come before all queries: a row may see those of the rows before it.
void Batch::attention(int t, int64_t block) {
  const acttail_model& m = engine_.model;
  const acttail_block& b = engine_.blocks[static_cast<size_t>(block)];
  Worker& w = *engine_.workers[static_cast<size_t>(t)];
  const int64_t threads = engine_.pool.threads();
  for (int64_t task = t; task < count_ * m.kv_heads; task += threads) {
    const Position p = position(task / m.kv_heads);
    const int64_t group = task % m.kv_heads;
    float key_scale = 0, value_scale = 0;
    engine_.make_entry(w, b, p, group, &key_scale, &value_scale);
    engine_.keep_entry(w, block, p, group, key_scale, value_scale);
  }
  engine_.pool.barrier().wait();
  const int64_t per_kv = m.heads / m.kv_heads, last = m.heads * (t + 1) / threads;
  for (int64_t i = 0; i < count_; ++i) {
    const Position p = position(i);
    int64_t heads = 0;
    for (int64_t h = m.heads * t / threads; h < last; h += heads) {
      const int64_t group = h / per_kv;
      heads = std::min(last, (group + 1) * per_kv) - h;
      KvHead kv{};
      kv.last_key = p.cache.key(block, group, p.index);
      kv.last_value = p.cache.value(block, group, p.index);
      if (p.cache.scaled()) {
        kv.last_key_scale = *p.cache.key_scale(block, group, p.index);
        kv.last_value_scale = *p.cache.value_scale(block, group, p.index);
      }
      engine_.attend(w, b, block, p, h, heads, kv);
    }
  }
}

// The norm before a block's attention, or before the head.
void Batch::begin(Lane& lane, int64_t block) {
  const acttail_model& m = engine_.model;
  const bool last = block == m.blocks;
  const acttail_norm& n = last ? m.final_norm : engine_.blocks[static_cast<size_t>(block)].input_norm;
  engine_.norm(n, lane.stream.data(), m.hidden, lane.normed.data());
}

void Batch::thread(int t) {
  const acttail_model& m = engine_.model;
  Barrier& barrier = engine_.pool.barrier();
  own(t, [&](Lane& lane, int64_t i) {
    engine_.embed(rows_[i].token, rows_[i].position, lane.stream);
    begin(lane, 0);
  });
  for (int64_t block = 0; block < m.blocks; ++block) {
    const acttail_block& b = engine_.blocks[static_cast<size_t>(block)];
    own(t, [&](Lane& lane, int64_t i) { choose(lane, b.qkv, lane.normed.data(), i); });
    barrier.wait();
    project(t, b.qkv);
    barrier.wait();
    attention(t, block);
    barrier.wait();
    own(t, [&](Lane& lane, int64_t i) { choose(lane, b.o, lane.attended.data(), i); });
    barrier.wait();
    project(t, b.o);
    barrier.wait();
    own(t, [&](Lane& lane, int64_t i) {
      if (b.parallel) engine_.norm(b.mlp_norm, lane.stream.data(), m.hidden, lane.normed.data());
      engine_.add_to_stream(b.o, sums(i), b.attention_norm, lane.out.data(), lane.stream.data());
      if (!b.parallel) engine_.norm(b.mlp_norm, lane.stream.data(), m.hidden, lane.normed.data());
      choose(lane, b.gate_up, lane.normed.data(), i);
    });
    barrier.wait();
    project(t, b.gate_up);
    barrier.wait();
    own(t, [&](Lane& lane, int64_t i) {
      engine_.activate(b, sums(i), lane.inner.data());
      choose(lane, b.down, lane.inner.data(), i);
    });
    barrier.wait();
    project(t, b.down);
    barrier.wait();
    own(t, [&](Lane& lane, int64_t i) {
      engine_.add_to_stream(b.down, sums(i), b.output_norm, lane.out.data(), lane.stream.data());
      begin(lane, block + 1);
    });
  }
  head(t);
}

// This thread's part of the logits, which are shared out by outputs.
void Batch::head(int t) {
  const acttail_model& m = engine_.model;
  const int64_t threads = engine_.pool.threads();
  const acttail_fused& f = m.head_input;
  own(t, [&](Lane& lane, int64_t i) {
    if (rows_[i].logits == nullptr) return;
    if (f.matrices > 0) {
      choose(lane, f, lane.normed.data(), i);
      return;
    }
    rows_[i].read += static_cast<double>(m.vocabulary * m.hidden);
    if (f.segments == 0) return;
    const Parts& parts = lane.selection.choose(engine_.kernels, engine_.head_selection, lane.normed.data());
    std::memcpy(lane.masked.data(), parts.begin()->rows.x, sizeof(float) * static_cast<size_t>(m.hidden));
    lane.normed.swap(lane.masked);
  });
  engine_.pool.barrier().wait();
  int64_t wanted[kMostTogether], n = 0;
  for (int64_t i = 0; i < count_; ++i) {
    if (rows_[i].logits != nullptr) wanted[n++] = i;
  }
  if (n == 0) return;
  int64_t first = m.vocabulary * t / threads, last = m.vocabulary * (t + 1) / threads;
  if (f.matrices == 0) {
    Worker& w = *engine_.workers[static_cast<size_t>(t)];
    for (int64_t at = first; at < last; at += kHeadRows) {
      const int64_t to = std::min(at + kHeadRows, last);
      for (int64_t k = 0; k < n; ++k) {
        const Lane& lane = *lanes_[static_cast<size_t>(wanted[k])];
        engine_.kernels.dot_rows(m.head, lane.normed.data(), at, to, rows_[wanted[k]].logits, w.dot.data());
      }
    }
  } else {
    const acttail_matrix& matrix = f.matrix[0];
    const int64_t block = kFormatTraits[matrix.format].block, blocks = matrix.columns / block;
    first = blocks * t / threads * block;
    const int64_t end = blocks * (t + 1) / threads * block;
    last = std::min(end, m.vocabulary);
    Rows rows[kMostTogether];
    // One segment: a part, or none where no row is kept.
    for (int64_t k = 0; k < n; ++k) {
      const Parts& own = *lanes_[static_cast<size_t>(wanted[k])]->parts;
      rows[k] = own.begin() == own.end() ? Rows{nullptr, nullptr, 0, 0} : own.begin()->rows;
    }
    for (int64_t at = first; at < end; at += kHeadColumns) {
      const int64_t to = std::min(at + kHeadColumns, end);
      for (int64_t k = 0; k < n; ++k) {
        std::fill(head_sums_.data() + k * matrix.columns + at, head_sums_.data() + k * matrix.columns + to, 0.0f);
      }
      engine_.kernels.add_rows_together(matrix, rows, n, at, to, head_sums_.data(), matrix.columns,
                                        scratch_.data() + t * kTogetherScratch);
    }
    first = std::min(first, m.vocabulary);
    for (int64_t k = 0; k < n; ++k) {
      std::memcpy(rows_[wanted[k]].logits + first, head_sums_.data() + k * matrix.columns + first,
                  sizeof(float) * static_cast<size_t>(last - first));
    }
  }
  for (int64_t k = 0; k < n; ++k) engine_.finish_logits(rows_[wanted[k]].logits, first, last);
}

}  // namespace acttail
