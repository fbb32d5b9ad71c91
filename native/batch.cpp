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
    : selection(static_cast<size_t>(e.most_visits),
                Selection(std::max({e.model.hidden, e.model.intermediate, e.model.heads * e.model.head_dim}))),
      angles(e.ropes),
      route(e.most_experts, e.most_visits),
      stream(static_cast<size_t>(padded(e.model.hidden))),
      normed(static_cast<size_t>(padded(e.model.hidden))),
      inner(static_cast<size_t>(e.most_visits * padded(2 * e.model.intermediate))),
      attended(static_cast<size_t>(padded(e.model.heads * e.model.head_dim))),
      out(static_cast<size_t>(padded(e.model.hidden))),
      added(static_cast<size_t>(padded(e.model.hidden))),
      products(e.products.size()),
      masked(static_cast<size_t>(padded(e.model.hidden))),
      parts(static_cast<size_t>(e.most_visits)) {}

Batch::Batch(acttail_engine& engine)
    : engine_(engine),
      partial_(static_cast<size_t>(engine.pool.threads() * stride())),
      stops_(static_cast<size_t>(engine.pool.threads())),
      scratch_(static_cast<size_t>(engine.pool.threads() * kTogetherScratch)) {
  for (int64_t i = 0; i < kMostTogether; ++i) lanes_.push_back(std::make_unique<Lane>(engine));
  for (auto& s : stops_) s.reserve(static_cast<size_t>(kMostTogether * engine.most_visits));
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

void Batch::choose(Lane& lane, const acttail_fused& fused, const float* x, int64_t row, int64_t visit) {
  Selection& selection = lane.selection[static_cast<size_t>(visit)];
  lane.parts[static_cast<size_t>(visit)] = &selection.choose(engine_.kernels, fused, x);
  rows_[row].read += selection.weights();
}

void Batch::project(int t, const acttail_fused& fused) {
  const Parts* parts[kMostTogether];
  for (int64_t i = 0; i < count_; ++i) parts[i] = lanes_[static_cast<size_t>(i)]->parts[0];
  project(t, fused, parts, count_, 0);
}

// This thread's share of every vector's W x, into its own partial sums.
void Batch::project(int t, const acttail_fused& fused, const Parts* const* parts, int64_t count, int64_t at) {
  float* const y = partial_.data() + t * stride() + at * engine_.widest;
  bool joint = count > 1;
  for (int64_t i = 0; i < count; ++i) {
    float* const own = y + i * engine_.widest;
    std::fill(own, own + columns_of(fused), 0.0f);
    joint = joint && alike(*parts[0], *parts[i]);
  }
  const int64_t threads = engine_.pool.threads();
  for (int64_t p = 0; joint && p < parts[0]->end() - parts[0]->begin(); ++p) {
    const Part& part = parts[0]->begin()[p];
    Rows rows[kMostTogether];
    for (int64_t i = 0; i < count; ++i) rows[i] = share(parts[i]->begin()[p].rows, t, threads);
    engine_.kernels.add_rows_together(*part.matrix, rows, count, part.begin, part.end, y + part.at, engine_.widest,
                                      scratch_.data() + t * kTogetherScratch);
  }
  for (int64_t i = 0; !joint && i < count; ++i) {
    for (const Part& part : *parts[i]) {
      const Rows rows = share(part.rows, t, threads);
      if (rows.count > 0) {
        engine_.kernels.add_rows(*part.matrix, rows, part.begin, part.end, y + i * engine_.widest + part.at);
      }
    }
  }
}

void Batch::route(int t, const acttail_block& b, Lane& lane) {
  if (b.experts == 0) return lane.route.plain(b);
  engine_.kernels.dot_rows(b.router, lane.normed.data(), 0, b.router.rows, lane.products.data(),
                           engine_.workers[static_cast<size_t>(t)]->dot.data());
  lane.route.choose(b, lane.products.data());
}

const std::vector<Stop>& Batch::stops(int t) {
  std::vector<Stop>& found = stops_[static_cast<size_t>(t)];
  found.clear();
  for (int64_t i = 0; i < count_; ++i) {
    int64_t visit = 0;
    for (const Visit& v : lanes_[static_cast<size_t>(i)]->route) found.push_back({v.number, i, visit++, v.mlp});
  }
  std::sort(found.begin(), found.end(), [](const Stop& a, const Stop& b) {
    return a.number != b.number ? a.number < b.number : a.lane < b.lane;
  });
  return found;
}

// Two stages, each MLP's weights read once for all the lanes that visit it.
void Batch::mlps(int t, const acttail_block& b) {
  Barrier& barrier = engine_.pool.barrier();
  const std::vector<Stop>& stops = this->stops(t);
  const auto stage = [&](acttail_fused acttail_mlp::*fused) {
    for (size_t first = 0, last = 0; first < stops.size(); first = last) {
      const Parts* parts[kMostTogether];
      for (; last < stops.size() && stops[last].number == stops[first].number; ++last) {
        const Stop& s = stops[last];
        parts[last - first] = lanes_[static_cast<size_t>(s.lane)]->parts[static_cast<size_t>(s.visit)];
      }
      project(t, stops[first].mlp->*fused, parts, static_cast<int64_t>(last - first), static_cast<int64_t>(first));
    }
  };
  stage(&acttail_mlp::gate_up);
  barrier.wait();
  for (size_t i = 0; i < stops.size(); ++i) {
    const Stop& s = stops[i];
    if (s.lane % engine_.pool.threads() != t) continue;
    Lane& lane = *lanes_[static_cast<size_t>(s.lane)];
    float* const inner = lane.inner.data() + s.visit * padded(2 * engine_.model.intermediate);
    engine_.activate(*s.mlp, sums(static_cast<int64_t>(i)), inner);
    choose(lane, s.mlp->down, inner, s.lane, s.visit);
  }
  barrier.wait();
  stage(&acttail_mlp::down);
  barrier.wait();
  // A lane adds up in the order of its route, as it would alone.
  own(t, [&](Lane& lane, int64_t row) {
    for (int64_t visit = 0; visit < lane.route.size(); ++visit) {
      const auto at = std::find_if(stops.begin(), stops.end(), [&](const Stop& s) { return s.lane == row && s.visit == visit; });
      engine_.add_visit(lane.route.begin()[visit], visit == 0, sums(at - stops.begin()), lane.added.data(), lane.out.data());
    }
    engine_.add_to_stream(b.output_norm, lane.out.data(), lane.stream.data());
  });
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
      engine_.collect(b.o, sums(i), 0, m.hidden, lane.out.data());
      engine_.add_to_stream(b.attention_norm, lane.out.data(), lane.stream.data());
      if (!b.parallel) engine_.norm(b.mlp_norm, lane.stream.data(), m.hidden, lane.normed.data());
      route(t, b, lane);
      int64_t visit = 0;
      for (const Visit& v : lane.route) choose(lane, v.mlp->gate_up, lane.normed.data(), i, visit++);
    });
    barrier.wait();
    mlps(t, b);
    own(t, [&](Lane& lane, int64_t) { begin(lane, block + 1); });
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
    const Parts& parts = lane.selection[0].choose(engine_.kernels, engine_.head_selection, lane.normed.data());
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
      const Parts& own = *lanes_[static_cast<size_t>(wanted[k])]->parts[0];
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
