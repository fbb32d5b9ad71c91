#include "batch.hpp"

#include <algorithm>

namespace acttail {

namespace {

// Columns of a head with rows of its own that are taken at a time; see engine.cpp.
constexpr int64_t kHeadColumns = 16384;
// Of a unit at least, where there are so many: two groups for each weight that memory gives.
constexpr int64_t kUnitRows = 2 * kMostTogether;

// Bytes of rows that one vector leaves in the caches for the next one, where it was not measured which is faster: vectors
// whose lists differ then go one after the other, each with its own rows alone. Eight of density 0.5 on a Zen 4 are faster so
// by 1.1 to 1.6 times, whatever the format, where each has 0.4 to 2.6 MB of rows.
constexpr int64_t kNearBytes = int64_t{2} << 20;

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

// Whether vectors multiply a part one after the other.
bool each_alone(const Part& part, const Rows* rows, int64_t count) {
  int64_t most = 0, listed = 0;
  for (int64_t i = 0; i < count; ++i) {
    listed += rows[i].index != nullptr && rows[i].count > 0;
    most = std::max(most, rows[i].count);
  }
  return listed > 0 && part.matrix->together == 0 &&
         most * (part.end - part.begin) * kFormatTraits[part.matrix->format].bits / 8 <= kNearBytes;
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

Batch::Batch(acttail_engine& engine) : engine_(engine) {
  const size_t threads = static_cast<size_t>(engine.pool.threads());
  stops_.resize(threads);
  scratch_.resize(threads * static_cast<size_t>(kTogetherScratch));
  if (engine.model.head_input.matrices > 0) {
    head_columns_ = std::min(columns_of(engine.model.head_input), kHeadColumns);
    head_sums_.resize(threads * static_cast<size_t>(kMostTogether * head_columns_));
  } else {
    dot_.resize(threads * static_cast<size_t>(kMostTogether * dot_scratch(padded(engine.model.hidden))));
  }
  rows_.reserve(static_cast<size_t>(kMostRows));
  units_.reserve(static_cast<size_t>(kMostRows));
}

void Batch::reserve(int64_t rows) {
  if (rows <= room_) return;
  // As many as are multiplied at a time: a few are rarely followed by exactly one more.
  const int64_t room = (rows + kMostTogether - 1) / kMostTogether * kMostTogether;
  while (static_cast<int64_t>(lanes_.size()) < room) lanes_.push_back(std::make_unique<Lane>(engine_));
  const int64_t visits = room * engine_.most_visits;
  for (Stops& s : stops_) {
    s.list.reserve(static_cast<size_t>(visits));
    s.at.resize(static_cast<size_t>(visits));
  }
  room_ = 0;
  partial_ = {};  // its sums are of the last pass: nobody needs them, and both at once would be twice as much
  partial_.resize(static_cast<size_t>(engine_.pool.threads() * visits * engine_.widest));
  room_ = room;
}

void Batch::run(Row* rows, int64_t count) {
  arrange(rows, count);
  divide();
  next_.store(0, std::memory_order_relaxed);
  auto work = [&](int t) { this->thread(t); };
  engine_.pool.run(work);
}

// Rows of one cache side by side, in their order.
void Batch::arrange(Row* rows, int64_t count) {
  rows_.clear();
  for (int64_t i = 0; i < count; ++i) {
    Row* const row = rows + i;
    row->read = 0;
    const auto last = std::find_if(rows_.rbegin(), rows_.rend(), [&](const Row* r) { return r->cache == row->cache; });
    rows_.insert(last == rows_.rend() ? rows_.end() : last.base(), row);
  }
}

// Cuts many rows into units, each of which one thread takes through the whole model. So nobody waits at barriers, of
// which there are seven a block, for a thread whose core does something else, and who is quick takes more units. Experts,
// of which each row visits others, are read less often if all rows go together.
void Batch::divide() {
  units_.clear();
  const int64_t count = static_cast<int64_t>(rows_.size()), threads = engine_.pool.threads();
  if (threads == 1 || count < threads * kMostTogether || engine_.most_experts > 0) return;
  const int64_t fair = (count + threads - 1) / threads, units = threads * std::max<int64_t>(1, fair / kUnitRows);
  const int64_t size = (count + units - 1) / units;
  Unit unit{0, 0};
  for (int64_t first = 0, last; first < count; first = last) {
    for (last = first + 1; last < count && row(last).cache == row(first).cache; ++last) {
    }
    if (unit.last > unit.first && last - unit.first > size) {
      units_.push_back(unit);
      unit.first = first;
    }
    unit.last = last;
  }
  units_.push_back(unit);
  std::sort(units_.begin(), units_.end(), [](const Unit& a, const Unit& b) { return a.last - a.first > b.last - b.first; });
  // A long prompt would be one thread's work while the others wait.
  if (units_.front().last - units_.front().first > fair) units_.clear();
}

void Batch::thread(int t) {
  const int threads = engine_.pool.threads();
  if (units_.empty()) return pass({t, 0, static_cast<int64_t>(rows_.size()), t, t + 1});
  for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < units_.size();) {
    pass({t, units_[i].first, units_[i].last, 0, threads});
  }
}

Position Batch::position(const Crew& crew, int64_t i) {
  Lane& lane = *lanes_[static_cast<size_t>(i)];
  return {*row(i).cache, row(i).position, lane.angles, sums(place(crew) + i - crew.first), lane.attended.data()};
}

void Batch::choose(Lane& lane, const acttail_fused& fused, const float* x, int64_t i, int64_t visit) {
  Selection& selection = lane.selection[static_cast<size_t>(visit)];
  lane.parts[static_cast<size_t>(visit)] = &selection.choose(engine_.kernels, fused, x);
  row(i).read += selection.weights();
}

void Batch::project(const Crew& crew, const acttail_fused& fused) {
  const Parts* parts[kMostRows];
  for (int64_t i = crew.first; i < crew.last; ++i) parts[i - crew.first] = lanes_[static_cast<size_t>(i)]->parts[0];
  project(crew, fused, parts, crew.last - crew.first, place(crew));
}

// W x of every vector, in sums of each thread's share: of one share after the other, so that its rows are still near when
// the next vectors come.
void Batch::project(const Crew& crew, const acttail_fused& fused, const Parts* const* parts, int64_t count, int64_t at) {
  for (int t = crew.from; t < crew.to; ++t) {
    for (int64_t first = 0; first < count; first += kMostTogether) {
      share_of(crew, t, fused, parts + first, std::min(kMostTogether, count - first), at + first);
    }
  }
}

void Batch::share_of(const Crew& crew, int t, const acttail_fused& fused, const Parts* const* parts, int64_t count,
                     int64_t at) {
  float* const y = partial_.data() + t * stride() + at * engine_.widest;
  bool joint = count > 1;
  for (int64_t i = 0; i < count; ++i) {
    float* const own = y + i * engine_.widest;
    std::fill(own, own + columns_of(fused), 0.0f);
    joint = joint && alike(*parts[0], *parts[i]);
  }
  const int64_t threads = engine_.pool.threads();
  const auto add = [&](const Part& part, const Rows& rows, int64_t i) {
    if (rows.count == 0) return;
    engine_.kernels.add_rows(*part.matrix, rows, part.begin, part.end, y + i * engine_.widest + part.at);
  };
  for (int64_t p = 0; joint && p < parts[0]->end() - parts[0]->begin(); ++p) {
    const Part& part = parts[0]->begin()[p];
    Rows rows[kMostTogether];
    for (int64_t i = 0; i < count; ++i) rows[i] = share(parts[i]->begin()[p].rows, t, threads);
    if (each_alone(part, rows, count)) {
      for (int64_t i = 0; i < count; ++i) add(part, rows[i], i);
      continue;
    }
    engine_.kernels.add_rows_together(*part.matrix, rows, count, part.begin, part.end, y + part.at, engine_.widest,
                                      scratch_.data() + crew.thread * kTogetherScratch);
  }
  for (int64_t i = 0; !joint && i < count; ++i) {
    for (const Part& part : *parts[i]) add(part, share(part.rows, t, threads), i);
  }
}

void Batch::route(const Crew& crew, const acttail_block& b, Lane& lane) {
  if (b.experts == 0) return lane.route.plain(b);
  engine_.kernels.dot_rows(b.router, lane.normed.data(), 0, b.router.rows, lane.products.data(),
                           engine_.workers[static_cast<size_t>(crew.thread)]->dot.data());
  lane.route.choose(b, lane.products.data());
}

const Stops& Batch::stops(const Crew& crew) {
  Stops& found = stops_[static_cast<size_t>(crew.thread)];
  found.list.clear();
  for (int64_t i = crew.first; i < crew.last; ++i) {
    int64_t visit = 0;
    for (const Visit& v : lanes_[static_cast<size_t>(i)]->route) found.list.push_back({v.number, i, visit++, v.mlp});
  }
  std::sort(found.list.begin(), found.list.end(), [](const Stop& a, const Stop& b) {
    return a.number != b.number ? a.number < b.number : a.lane < b.lane;
  });
  for (size_t i = 0; i < found.list.size(); ++i) {
    const Stop& s = found.list[i];
    found.at[static_cast<size_t>((s.lane - crew.first) * engine_.most_visits + s.visit)] = static_cast<int64_t>(i);
  }
  return found;
}

// Two stages, each MLP's weights read once for kMostTogether lanes that visit it.
void Batch::mlps(const Crew& crew, const acttail_block& b) {
  const Stops& found = this->stops(crew);
  const std::vector<Stop>& stops = found.list;
  const int64_t place = this->place(crew);
  const auto stage = [&](acttail_fused acttail_mlp::*fused) {
    for (size_t first = 0, last = 0; first < stops.size(); first = last) {
      const Parts* parts[kMostRows];
      for (; last < stops.size() && stops[last].number == stops[first].number; ++last) {
        const Stop& s = stops[last];
        parts[last - first] = lanes_[static_cast<size_t>(s.lane)]->parts[static_cast<size_t>(s.visit)];
      }
      project(crew, stops[first].mlp->*fused, parts, static_cast<int64_t>(last - first),
              place + static_cast<int64_t>(first));
    }
  };
  stage(&acttail_mlp::gate_up);
  meet(crew);
  own(crew, [&](Lane& lane, int64_t i) {
    for (int64_t visit = 0; visit < lane.route.size(); ++visit) {
      const int64_t at = found.at[static_cast<size_t>((i - crew.first) * engine_.most_visits + visit)];
      float* const inner = lane.inner.data() + visit * padded(2 * engine_.model.intermediate);
      const acttail_mlp& mlp = *lane.route.begin()[visit].mlp;
      engine_.activate(mlp, sums(place + at), inner);
      choose(lane, mlp.down, inner, i, visit);
    }
  });
  meet(crew);
  stage(&acttail_mlp::down);
  meet(crew);
  // A lane adds up in the order of its route, as it would alone.
  own(crew, [&](Lane& lane, int64_t i) {
    for (int64_t visit = 0; visit < lane.route.size(); ++visit) {
      const int64_t at = found.at[static_cast<size_t>((i - crew.first) * engine_.most_visits + visit)];
      engine_.add_visit(lane.route.begin()[visit], visit == 0, sums(place + at), lane.added.data(), lane.out.data());
    }
    engine_.add_to_stream(b.output_norm, lane.out.data(), lane.stream.data());
  });
}

// All keys and values come before all queries: a row may see those of the rows before it.
void Batch::attention(const Crew& crew, int64_t block) {
  const acttail_model& m = engine_.model;
  const acttail_block& b = engine_.blocks[static_cast<size_t>(block)];
  Worker& w = *engine_.workers[static_cast<size_t>(crew.thread)];
  const int64_t threads = engine_.pool.threads(), count = crew.last - crew.first;
  for (int t = crew.from; t < crew.to; ++t) {
    for (int64_t task = t; task < count * m.kv_heads; task += threads) {
      const Position p = position(crew, crew.first + task / m.kv_heads);
      const int64_t group = task % m.kv_heads;
      float key_scale = 0, value_scale = 0;
      engine_.make_entry(w, b, p, group, &key_scale, &value_scale);
      engine_.keep_entry(w, block, p, group, key_scale, value_scale);
    }
  }
  meet(crew);
  // Shares that follow one another are one: heads get the same however many are taken at a time.
  const int64_t per_kv = m.heads / m.kv_heads;
  const int64_t first = m.heads * crew.from / threads, last = m.heads * crew.to / threads;
  for (int64_t i = crew.first; i < crew.last; ++i) {
    const Position p = position(crew, i);
    int64_t heads = 0;
    for (int64_t h = first; h < last; h += heads) {
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

void Batch::pass(const Crew& crew) {
  const acttail_model& m = engine_.model;
  own(crew, [&](Lane& lane, int64_t i) {
    lane.angles.turn(engine_.ropes, row(i).position);
    engine_.embed(row(i).token, row(i).position, lane.stream);
    begin(lane, 0);
  });
  for (int64_t block = 0; block < m.blocks; ++block) {
    const acttail_block& b = engine_.blocks[static_cast<size_t>(block)];
    own(crew, [&](Lane& lane, int64_t i) { choose(lane, b.qkv, lane.normed.data(), i); });
    meet(crew);
    project(crew, b.qkv);
    meet(crew);
    attention(crew, block);
    meet(crew);
    own(crew, [&](Lane& lane, int64_t i) { choose(lane, b.o, lane.attended.data(), i); });
    meet(crew);
    project(crew, b.o);
    meet(crew);
    own(crew, [&](Lane& lane, int64_t i) {
      if (b.parallel) engine_.norm(b.mlp_norm, lane.stream.data(), m.hidden, lane.normed.data());
      engine_.collect(b.o, sums(place(crew) + i - crew.first), 0, m.hidden, lane.out.data());
      engine_.add_to_stream(b.attention_norm, lane.out.data(), lane.stream.data());
      if (!b.parallel) engine_.norm(b.mlp_norm, lane.stream.data(), m.hidden, lane.normed.data());
      route(crew, b, lane);
      int64_t visit = 0;
      for (const Visit& v : lane.route) choose(lane, v.mlp->gate_up, lane.normed.data(), i, visit++);
    });
    meet(crew);
    mlps(crew, b);
    own(crew, [&](Lane& lane, int64_t) { begin(lane, block + 1); });
  }
  head(crew);
}

}  // namespace acttail
