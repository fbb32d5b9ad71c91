// The engine against the same decoder in float64: every format, rule, norm and cache, one thread and three,
// and every order in which projections can lie in memory. Run under sanitizers by scripts/check_native.sh.
#include <cstdio>
#include <cstdlib>

#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "decoder.hpp"

namespace {

using decoder::Decoder;
using decoder::Options;

int failures = 0;

void expect(bool condition, const char* what, const Options& o) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (format %d, rule %d, kv %d, layer norm %d, seed %u)\n", what, o.format, o.rule, o.kv,
              o.layer_norm, o.seed);
}

struct Run {
  std::vector<float> logits;
  double read = 0;
};

Run decode(const Decoder& d, const std::vector<int64_t>& tokens, int threads) {
  acttail_engine* engine = nullptr;
  acttail_cache* cache = nullptr;
  if (acttail_engine_new(&d.model, threads, &engine) != ACTTAIL_OK) std::abort();
  const int64_t n = static_cast<int64_t>(tokens.size());
  if (acttail_cache_new(engine, nullptr, n, &cache) != ACTTAIL_OK) std::abort();
  Run run;
  run.logits.resize(static_cast<size_t>(n * Decoder::vocabulary));
  if (acttail_engine_forward(engine, cache, tokens.data(), n, 1, run.logits.data(), &run.read)) std::abort();
  // Full: refused, not overrun.
  float unused[Decoder::vocabulary];
  if (acttail_engine_forward(engine, cache, tokens.data(), 1, 0, unused, nullptr) != ACTTAIL_BAD_ARGUMENT) {
    std::abort();
  }
  if (acttail_cache_truncate(cache, 2) != ACTTAIL_OK || acttail_cache_length(cache) != 2) std::abort();
  acttail_cache_free(cache);
  acttail_engine_free(engine);
  return run;
}

std::vector<int64_t> some_tokens(int64_t n) {
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < n; ++i) tokens.push_back((i * 37 + 5) % Decoder::vocabulary);
  return tokens;
}

double worst(const std::vector<double>& expected, const std::vector<float>& got) {
  double top = 0, off = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    top = std::max(top, std::fabs(expected[i]));
    const double error = std::fabs(expected[i] - static_cast<double>(got[i]));
    off = error <= off ? off : error;  // NaN counts as the worst
  }
  return off / top;
}

// How far the logits may be from the truth, relative to the largest, and how far a selection must be from
// turning over. VNNI takes x in 15 bits (vnni.inc); a cache in few bits may round an entry the other way.
struct Limits {
  double error, margin;
};
Limits limits(const Options& o) {
  const bool integer = o.mixed || acttail::kFormatTraits[o.format].scaled;
  const double kernel = integer ? 1e-3 : 1e-5;
  const double cache = o.kv == acttail::kKvF32 ? 0.0 : 1e-2;
  return {kernel + cache, integer ? 2e-3 : 1e-4};
}

// The first seed that leaves rounding no selection to turn over, so that sparse runs can be held to a limit.
uint32_t clear_seed(Options o, const std::vector<int64_t>& tokens) {
  for (o.seed = 1; o.seed < 2000; ++o.seed) {
    double margin, read;
    Decoder(o).truth(tokens, &margin, &read);
    if (margin > limits(o).margin) return o.seed;
  }
  std::abort();
}

void against_truth(Options o) {
  const std::vector<int64_t> tokens = some_tokens(5);
  o.seed = clear_seed(o, tokens);
  const Decoder d(o);
  double margin, read;
  const std::vector<double> expected = d.truth(tokens, &margin, &read);
  for (int threads : {1, 3}) {
    const Run run = decode(d, tokens, threads);
    const double error = worst(expected, run.logits);
    if (!(error <= limits(o).error)) std::printf("error %g, limit %g: ", error, limits(o).error);
    expect(error <= limits(o).error, "logits differ from float64", o);
    expect(run.read == read, "weights read", o);
  }
}

// A fork goes on as its origin does, whoever writes first, and the pages they share are counted once.
void forks(const Options& o) {
  const Decoder d(o);
  constexpr int64_t most = 80, shared = 40;
  acttail_engine* engine = nullptr;
  acttail_pool* pool = nullptr;
  if (acttail_engine_new(&d.model, 2, &engine) != ACTTAIL_OK || acttail_pool_new(&pool) != ACTTAIL_OK) std::abort();
  const std::vector<int64_t> tokens = some_tokens(most);
  acttail_cache *one = nullptr, *two = nullptr, *none = nullptr;
  if (acttail_cache_new(engine, pool, most, &one) != ACTTAIL_OK) std::abort();
  std::vector<float> expected(Decoder::vocabulary), got(expected);
  const auto feed = [&](acttail_cache* cache, int64_t first, int64_t last, std::vector<float>& logits) {
    if (acttail_engine_forward(engine, cache, tokens.data() + first, last - first, 0, logits.data(), nullptr)) std::abort();
  };
  feed(one, 0, 70, expected);
  const int64_t page = acttail_pool_bytes(pool) / 3;
  expect(page > 0 && acttail_pool_bytes(pool) == 3 * page && acttail_cache_bytes(one) == 3 * page, "pages", o);
  if (acttail_cache_fork(one, shared, most, &two) != ACTTAIL_OK) std::abort();
  expect(acttail_pool_bytes(pool) == 3 * page && acttail_cache_bytes(two) == 2 * page, "pages shared", o);
  expect(acttail_cache_lacks(two, 1) == page && acttail_cache_lacks(two, 25) == 2 * page &&
             acttail_cache_lacks(one, 1) == 0 && acttail_cache_lacks(one, most) == -1, "pages lacking", o);
  feed(two, shared, 70, got);
  expect(std::memcmp(got.data(), expected.data(), sizeof(float) * got.size()) == 0, "a fork goes on otherwise", o);
  expect(acttail_pool_bytes(pool) == 5 * page, "pages after a fork went on", o);
  // Other tokens in the fork, and the origin does not see them.
  if (acttail_cache_truncate(two, 35)) std::abort();
  feed(two, 0, 20, got);
  feed(one, 70, most, expected);
  acttail_cache_free(two);
  expect(acttail_pool_bytes(pool) == 3 * page, "pages of a fork that is gone", o);
  if (acttail_cache_new(engine, pool, most, &two) != ACTTAIL_OK) std::abort();
  feed(two, 0, most, got);
  expect(std::memcmp(got.data(), expected.data(), sizeof(float) * got.size()) == 0, "an origin changed", o);
  expect(acttail_cache_fork(one, most + 1, 2 * most, &none) != ACTTAIL_OK && none == nullptr, "a fork of what is not", o);
  expect(acttail_cache_fork(one, 5, 4, &none) != ACTTAIL_OK && none == nullptr, "a fork without room", o);
  acttail_pool_free(pool);  // caches may outlive it
  acttail_cache_free(one);
  acttail_cache_free(two);
  acttail_engine_free(engine);
}

// The order of projections in memory changes neither a bit of the logits nor what is read.
void all_orders(Options o) {
  const std::vector<int64_t> tokens = some_tokens(6);
  const Run best = decode(Decoder(o), tokens, 2);
  int order[3] = {0, 1, 2};
  while (std::next_permutation(order, order + 3)) {
    std::copy(order, order + 3, o.order);
    const Run run = decode(Decoder(o), tokens, 2);
    expect(std::memcmp(run.logits.data(), best.logits.data(), sizeof(float) * best.logits.size()) == 0,
           "logits depend on the order of projections", o);
    expect(run.read == best.read, "weights read depend on the order of projections", o);
  }
}

struct Load {
  int threads;
  int64_t sequences, prompt;  // sequences of a pass, and tokens that the first of them takes
};

// More rows than are multiplied at a time: of two groups, of units that threads take for themselves, together again for a
// long prompt, on one thread.
const std::vector<Load> kWide{{3, 8, 2}, {2, 30, 4}, {3, 61, 4}, {2, 58, 6}, {2, 2, 20}, {1, 61, 4}, {2, 125, 4}};

// Several tokens in one pass, some of one sequence, get bit for bit what each gets alone, and leave the same cache.
void together(const Options& o, const std::vector<Load>& loads = {{1, 4, 4}, {3, 4, 4}}) {
  const Decoder d(o);
  constexpr int64_t steps = 3;
  for (const auto [threads, sequences, prompt] : loads) {
    acttail_engine* engine = nullptr;
    if (acttail_engine_new(&d.model, threads, &engine) != ACTTAIL_OK) std::abort();
    std::vector<acttail_cache*> alone(static_cast<size_t>(sequences)), joint(alone);
    for (size_t i = 0; i < alone.size(); ++i) {
      if (acttail_cache_new(engine, nullptr, steps * prompt + 1, &alone[i]) != ACTTAIL_OK ||
          acttail_cache_new(engine, nullptr, steps * prompt + 1, &joint[i]) != ACTTAIL_OK) {
        std::abort();
      }
    }
    for (int64_t step = 0; step < steps; ++step) {
      // The first sequence takes several tokens at once, as a prompt does; of the others each one. What one cache gets
      // need not stand together.
      std::vector<acttail_cache*> caches;
      std::vector<int64_t> tokens;
      std::vector<Run> expected, got;
      const auto add = [&](int64_t i, int64_t n) {
        const auto at = static_cast<size_t>(i);
        const int64_t token = (31 * step + 17 * i + 5 * n + 1) % Decoder::vocabulary;
        Run run;
        run.logits.resize(Decoder::vocabulary);
        if (acttail_engine_forward(engine, alone[at], &token, 1, 0, run.logits.data(), &run.read)) std::abort();
        expected.push_back(run);
        got.push_back(Run{std::vector<float>(Decoder::vocabulary), 0});
        caches.push_back(joint[at]);
        tokens.push_back(token);
      };
      for (int64_t n = 0; n + 1 < prompt; ++n) add(0, n);
      for (int64_t i = 1; i < (step == 1 ? 2 : sequences); ++i) add(i, 0);
      add(0, prompt - 1);
      const int64_t count = static_cast<int64_t>(tokens.size());
      std::vector<float*> logits;
      std::vector<double> read(tokens.size());
      for (Run& run : got) logits.push_back(run.logits.data());
      logits[1] = nullptr;  // nobody asks
      if (acttail_engine_step(engine, caches.data(), tokens.data(), count, logits.data(), read.data())) std::abort();
      for (size_t i = 0; i < got.size(); ++i) {
        if (i == 1) continue;
        expect(std::memcmp(got[i].logits.data(), expected[i].logits.data(), sizeof(float) * Decoder::vocabulary) == 0,
               "a token of a batch is not what it is alone", o);
        expect(read[i] == expected[i].read, "weights read in a batch", o);
      }
    }
    for (size_t i = 0; i < alone.size(); ++i) {
      expect(acttail_cache_length(alone[i]) == acttail_cache_length(joint[i]), "length after a batch", o);
      acttail_cache_free(alone[i]);
      acttail_cache_free(joint[i]);
    }
    acttail_engine_free(engine);
  }
}

// What a batch must refuse leaves every cache as it was.
void refused_batches() {
  const Options o;
  const Decoder d(o);
  acttail_engine* engine = nullptr;
  acttail_cache *one = nullptr, *two = nullptr;
  if (acttail_engine_new(&d.model, 2, &engine) != ACTTAIL_OK || acttail_cache_new(engine, nullptr, 2, &one) != ACTTAIL_OK ||
      acttail_cache_new(engine, nullptr, 4, &two) != ACTTAIL_OK) {
    std::abort();
  }
  float* const none[129] = {};
  const auto step = [&](std::vector<acttail_cache*> caches, std::vector<int64_t> tokens) {
    return acttail_engine_step(engine, caches.data(), tokens.data(), static_cast<int64_t>(tokens.size()), none, nullptr);
  };
  expect(step({one, two, one, one}, {1, 2, 3, 4}) == ACTTAIL_BAD_ARGUMENT, "a batch that is longer than a cache", o);
  expect(step({one, two}, {1, Decoder::vocabulary}) == ACTTAIL_BAD_ARGUMENT, "an unknown token in a batch", o);
  expect(step({one, nullptr}, {1, 2}) == ACTTAIL_BAD_ARGUMENT, "no cache in a batch", o);
  expect(step({}, {}) == ACTTAIL_BAD_ARGUMENT, "an empty batch", o);
  expect(step(std::vector<acttail_cache*>(129, two), std::vector<int64_t>(129, 1)) == ACTTAIL_BAD_ARGUMENT, "129 rows", o);
  expect(acttail_cache_length(one) == 0 && acttail_cache_length(two) == 0, "a refused batch", o);
  expect(step({two, one, two}, {1, 2, 3}) == ACTTAIL_OK && acttail_cache_length(two) == 2, "a good batch", o);
  acttail_cache_free(one);
  acttail_cache_free(two);
  acttail_engine_free(engine);
}

// No sequence is longer than its model's positions, not by a cache of another model's either.
void beyond_positions() {
  Options o;
  const Decoder any(o);
  o.learned = true;
  const Decoder d(o);
  acttail_engine *engine = nullptr, *other = nullptr;
  acttail_cache* cache = nullptr;
  if (acttail_engine_new(&d.model, 1, &engine) != ACTTAIL_OK || acttail_engine_new(&any.model, 1, &other) != ACTTAIL_OK) {
    std::abort();
  }
  expect(acttail_cache_new(engine, nullptr, Decoder::positions + 1, &cache) == ACTTAIL_BAD_ARGUMENT, "a cache beyond positions", o);
  if (acttail_cache_new(other, nullptr, Decoder::positions + 1, &cache) != ACTTAIL_OK) std::abort();
  const int64_t token = 1;
  float* const none[1] = {};
  expect(acttail_engine_forward(engine, cache, &token, 1, 0, nullptr, nullptr) == ACTTAIL_BAD_ARGUMENT &&
             acttail_engine_step(engine, &cache, &token, 1, none, nullptr) == ACTTAIL_BAD_ARGUMENT,
         "another model's longer cache", o);
  acttail_cache_free(cache);
  acttail_model wrong = d.model;
  wrong.positions = 0;
  acttail_engine* none_made = nullptr;
  expect(acttail_engine_new(&wrong, 1, &none_made) == ACTTAIL_BAD_ARGUMENT, "no positions", o);
  acttail_engine_free(engine);
  acttail_engine_free(other);
}

// Long enough for every path of the attention, and for sanitizers to see the threads at work.
void long_run(const Options& o) {
  for (int threads : {1, 4}) {
    const Run run = decode(Decoder(o), some_tokens(40), threads);
    bool finite = true;
    for (float v : run.logits) finite = finite && std::isfinite(v);
    expect(finite, "a long run is not finite", o);
  }
}

bool no_engine(const acttail_model& model) {
  acttail_engine* engine = nullptr;
  const int status = acttail_engine_new(&model, 1, &engine);
  acttail_engine_free(engine);
  return status == ACTTAIL_BAD_ARGUMENT && engine == nullptr;
}

void refusals() {
  const Options o;
  const auto refused = [&](auto change) {
    const Decoder d(o);
    acttail_model model = d.model;
    std::vector<acttail_block> blocks(model.block, model.block + model.blocks);
    change(model, blocks[1]);
    model.block = blocks.data();
    return no_engine(model);
  };
  expect(!refused([](acttail_model&, acttail_block&) {}), "a good model is refused", o);
  expect(refused([](acttail_model& m, acttail_block&) { m.kv_format = 3; }), "KV format", o);
  expect(refused([](acttail_model& m, acttail_block&) { m.activation = 4; }), "activation", o);
  expect(refused([](acttail_model& m, acttail_block&) { m.kv_heads = 3; }), "heads", o);
  expect(refused([](acttail_model& m, acttail_block&) { m.embedding.rows -= 1; }), "embedding", o);
  expect(refused([](acttail_model& m, acttail_block&) { m.embedding.data = nullptr; }), "no embedding", o);
  expect(refused([](acttail_model&, acttail_block& b) { b.qkv.matrix[0].format = 4; }), "format", o);
  expect(refused([](acttail_model&, acttail_block& b) { b.qkv.matrix[0].format = acttail::kInt8; }), "no scales", o);
  expect(refused([](acttail_model&, acttail_block& b) { b.qkv.segment[1].begin += 64; }), "a gap", o);
  expect(refused([](acttail_model&, acttail_block& b) { b.qkv.segments = 4; }), "segments", o);
  expect(refused([](acttail_model&, acttail_block& b) { b.qkv.matrices = 0; }), "no matrix", o);
  expect(refused([](acttail_model&, acttail_block& b) {
           b.qkv.matrices = 2;
           b.qkv.matrix[1] = b.qkv.matrix[0];
         }),
         "columns without a projection", o);
  expect(refused([](acttail_model&, acttail_block& b) { b.o.segment[0].outputs = 65; }), "outputs", o);
  expect(refused([](acttail_model&, acttail_block& b) { b.o.segment[0].rule = ACTTAIL_TOPK; }) == false, "k", o);
  expect(refused([](acttail_model&, acttail_block& b) {
           b.o.segment[0].rule = ACTTAIL_TOPK;
           b.o.segment[0].k = 0;
         }),
         "k = 0", o);
  expect(refused([](acttail_model&, acttail_block& b) { b.v_offset = 190; }), "offset", o);
  expect(refused([](acttail_model&, acttail_block& b) { b.rope = 1; }), "rope", o);
  expect(refused([](acttail_model&, acttail_block& b) { b.mlp = {}; }), "no MLP", o);
  expect(refused([](acttail_model&, acttail_block& b) { b.shared_gate = 1; }), "a gate without a router", o);
}

// Of a block with a router.
void refused_routers() {
  Options o;
  o.routed = true;
  const Decoder d(o);
  const auto refused = [&](int64_t at, auto change) {
    acttail_model model = d.model;
    std::vector<acttail_block> blocks(model.block, model.block + model.blocks);
    acttail_block& block = blocks[static_cast<size_t>(at)];
    std::vector<acttail_mlp> experts(block.expert, block.expert + block.experts);
    block.expert = experts.data();
    change(block, experts[1]);
    model.block = blocks.data();
    return no_engine(model);
  };
  using B = acttail_block;
  using E = acttail_mlp;
  expect(!refused(0, [](B&, E&) {}) && !refused(1, [](B&, E&) {}), "good experts are refused", o);
  expect(!refused(0, [](B& b, E&) { b.active = Decoder::experts; }), "all experts", o);
  expect(refused(0, [](B& b, E&) { b.active = Decoder::experts + 1; }), "more active than there are", o);
  expect(refused(0, [](B& b, E&) { b.active = 0; }), "none active", o);
  expect(refused(0, [](B& b, E&) { b.experts = 0; }), "a block of nothing", o);
  expect(refused(0, [](B& b, E&) { b.experts += 1; }), "more experts than rows of the router", o);
  expect(refused(0, [](B& b, E&) { b.expert = nullptr; }), "no experts", o);
  expect(refused(0, [](B& b, E&) { b.shared_gate = 1; }), "a gate of no MLP", o);
  expect(refused(1, [](B& b, E&) { b.shared_gate = 0; }), "a row too many", o);
  expect(refused(1, [](B& b, E&) { b.shared_gate = 2; }), "two gates", o);
  expect(refused(1, [](B& b, E&) { b.mlp.gate_up.matrices = 0; }), "half an MLP", o);
  expect(refused(0, [](B& b, E&) { b.router.data = nullptr; }), "no router", o);
  expect(refused(0, [](B& b, E&) { b.router.format = acttail::kBf16; }), "a router in bf16", o);
  expect(refused(0, [](B& b, E&) { b.router.columns += 64; }), "a wide router", o);
  expect(refused(0, [](B&, E& e) { e.intermediate = Decoder::inner + 1; }), "a wide expert", o);
  expect(refused(0, [](B&, E& e) { e.intermediate -= 1; }), "features inside", o);
  expect(refused(0, [](B&, E& e) { e.up_offset = e.gate_offset; }), "one on the other", o);
  expect(refused(0, [](B&, E& e) { e.down.matrix[0].rows += 1; }), "inputs of down", o);
  expect(refused(0, [](B&, E& e) { e.gate_up.matrix[0].data = nullptr; }), "no data", o);
}

// Every number of a description, with every value that a careless sum or product of it would wrap or that means
// nothing: the model is refused, or runs without a step outside of what is described (the sanitizers watch).
void malformed(bool routed) {
  Options o;
  o.rule = ACTTAIL_TOPK;
  o.routed = routed;
  const Decoder d(o);
  constexpr int64_t kLow = std::numeric_limits<int64_t>::min(), kHigh = std::numeric_limits<int64_t>::max();
  const int64_t wide[] = {-1, 0, kLow, kHigh, kHigh - 63, int64_t{1} << 31, int64_t{1} << 40, kHigh / 2 + 1};
  const int32_t narrow[] = {-1, 99, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()};
  const float real[] = {NAN, INFINITY, -INFINITY, -1.0f, 0.0f};
  int tried = 0, ran = 0;
  acttail_mlp* expert = nullptr;  // of the attempt under way
  const auto attempt = [&](auto change) {
    acttail_model model = d.model;
    std::vector<acttail_block> blocks(model.block, model.block + model.blocks);
    std::vector<acttail_rope> ropes(model.rope, model.rope + model.ropes);
    std::vector<acttail_mlp> experts(blocks[1].expert, blocks[1].expert + blocks[1].experts);
    if (routed) blocks[1].expert = expert = experts.data();
    change(model, blocks[1], ropes[0]);
    model.block = blocks.data();
    model.rope = ropes.data();
    ++tried;
    acttail_engine* engine = nullptr;
    const int status = acttail_engine_new(&model, 2, &engine);
    expect((status == ACTTAIL_OK) == (engine != nullptr), "an engine that was refused", o);
    if (status != ACTTAIL_OK) return expect(status == ACTTAIL_BAD_ARGUMENT, "another status", o);
    ++ran;
    acttail_cache* cache = nullptr;
    if (acttail_cache_new(engine, nullptr, 4, &cache) != ACTTAIL_OK) std::abort();
    const int64_t tokens[] = {1, 2, 3};
    std::vector<float> logits(static_cast<size_t>(Decoder::vocabulary));
    expect(acttail_engine_forward(engine, cache, tokens, 3, 0, logits.data(), nullptr) == ACTTAIL_OK, "forward", o);
    acttail_cache_free(cache);
    acttail_engine_free(engine);
  };
  using M = acttail_model;
  using B = acttail_block;
  using R = acttail_rope;
  using W = std::function<int64_t&(M&, B&, R&)>;
  const W longs[] = {
      [](M& m, B&, R&) -> int64_t& { return m.blocks; }, [](M& m, B&, R&) -> int64_t& { return m.ropes; },
      [](M& m, B&, R&) -> int64_t& { return m.hidden; }, [](M& m, B&, R&) -> int64_t& { return m.heads; },
      [](M& m, B&, R&) -> int64_t& { return m.kv_heads; }, [](M& m, B&, R&) -> int64_t& { return m.head_dim; },
      [](M& m, B&, R&) -> int64_t& { return m.intermediate; },
      [](M& m, B&, R&) -> int64_t& { return m.vocabulary; },
      [](M& m, B&, R&) -> int64_t& { return m.embedding.rows; },
      [](M& m, B&, R&) -> int64_t& { return m.head.columns; },
      [](M&, B& b, R&) -> int64_t& { return b.q_offset; }, [](M&, B& b, R&) -> int64_t& { return b.k_offset; },
      [](M&, B& b, R&) -> int64_t& { return b.v_offset; }, [](M&, B& b, R&) -> int64_t& { return b.mlp.gate_offset; },
      [](M&, B& b, R&) -> int64_t& { return b.mlp.up_offset; }, [](M&, B& b, R&) -> int64_t& { return b.window; },
      [](M&, B& b, R&) -> int64_t& { return b.qkv.matrix[0].rows; },
      [](M&, B& b, R&) -> int64_t& { return b.qkv.matrix[0].columns; },
      [](M&, B& b, R&) -> int64_t& { return b.mlp.down.matrix[0].rows; },
      [](M&, B& b, R&) -> int64_t& { return b.o.matrix[0].columns; },
      [](M&, B& b, R&) -> int64_t& { return b.qkv.segment[0].begin; },
      [](M&, B& b, R&) -> int64_t& { return b.qkv.segment[0].end; },
      [](M&, B& b, R&) -> int64_t& { return b.qkv.segment[2].end; },
      [](M&, B& b, R&) -> int64_t& { return b.qkv.segment[1].outputs; },
      [](M&, B& b, R&) -> int64_t& { return b.mlp.down.segment[0].k; }, [](M&, B&, R& r) -> int64_t& { return r.half; },
  };
  for (const W& field : longs) {
    for (int64_t value : wide) attempt([&](M& m, B& b, R& r) { field(m, b, r) = value; });
  }
  const W of_routers[] = {
      [](M&, B& b, R&) -> int64_t& { return b.experts; }, [](M&, B& b, R&) -> int64_t& { return b.active; },
      [](M&, B& b, R&) -> int64_t& { return b.router.rows; }, [](M&, B& b, R&) -> int64_t& { return b.router.columns; },
      [&](M&, B&, R&) -> int64_t& { return expert[1].intermediate; }, [&](M&, B&, R&) -> int64_t& { return expert[1].up_offset; },
      [&](M&, B&, R&) -> int64_t& { return expert[1].gate_offset; }, [&](M&, B&, R&) -> int64_t& { return expert[1].down.matrix[0].rows; },
      [&](M&, B&, R&) -> int64_t& { return expert[1].gate_up.matrix[0].columns; },
  };
  for (const W& field : of_routers) {
    for (int64_t value : wide) {
      if (routed) attempt([&](M& m, B& b, R& r) { field(m, b, r) = value; });
    }
  }
  using N = std::function<int32_t&(M&, B&, R&)>;
  const N ints[] = {
      [](M& m, B&, R&) -> int32_t& { return m.activation; }, [](M& m, B&, R&) -> int32_t& { return m.kv_format; },
      [](M& m, B&, R&) -> int32_t& { return m.embedding.format; },
      [](M&, B& b, R&) -> int32_t& { return b.qkv.segments; }, [](M&, B& b, R&) -> int32_t& { return b.rope; },
      [](M&, B& b, R&) -> int32_t& { return b.o.matrix[0].format; },
      [](M&, B& b, R&) -> int32_t& { return b.o.segment[0].rule; },
      [](M&, B& b, R&) -> int32_t& { return b.shared_gate; }, [](M&, B& b, R&) -> int32_t& { return b.normalised; },
  };
  for (const N& field : ints) {
    for (int32_t value : narrow) attempt([&](M& m, B& b, R& r) { field(m, b, r) = value; });
  }
  for (float value : real) {
    attempt([&](M& m, B&, R&) { m.norm_eps = value; });
    attempt([&](M& m, B&, R&) { m.attention_scale = m.logit_softcap = value; });
    attempt([&](M&, B& b, R& r) { b.qkv.segment[0].threshold = r.scale = value; });
    attempt([&](M&, B& b, R&) {
      b.qkv.segment[1].rule = ACTTAIL_THRESHOLD;
      b.qkv.segment[1].threshold = value;
    });
  }
  attempt([](M&, B& b, R&) { b.input_norm.weight = nullptr; });
  attempt([](M& m, B&, R&) { m.final_norm.weight = nullptr; });
  attempt([](M&, B& b, R&) { b.mlp.gate_up.matrix[0].data = nullptr; });
  attempt([](M&, B& b, R&) { b.k_offset = b.q_offset; });
  attempt([](M&, B&, R& r) { r.inv_freq = nullptr; });
  expect(ran > 0 && ran < tried / 2, "most malformed models are refused", o);

  acttail_engine* engine = nullptr;
  acttail_cache* cache = nullptr;
  if (acttail_engine_new(&d.model, 1, &engine) != ACTTAIL_OK) std::abort();
  for (int64_t value : wide) {
    if (value == int64_t{1} << 31 || value == int64_t{1} << 40) continue;  // the system's to grant or refuse
    expect(acttail_cache_new(engine, nullptr, value, &cache) != ACTTAIL_OK && cache == nullptr, "a cache of any size", o);
  }
  if (acttail_cache_new(engine, nullptr, 4, &cache) != ACTTAIL_OK) std::abort();
  std::vector<float> rows(4 * 1024);
  for (int64_t value : wide) {
    const int64_t one = value == 0 ? -1 : value;
    expect(acttail_cache_write(cache, 0, one, 1, rows.data(), rows.data()) != ACTTAIL_OK, "first", o);
    expect(acttail_cache_write(cache, 0, 1, one, rows.data(), rows.data()) != ACTTAIL_OK, "count", o);
    expect(acttail_cache_read(cache, one, 0, 0, rows.data(), rows.data()) != ACTTAIL_OK, "block", o);
    expect(acttail_cache_read(cache, 0, one, one, rows.data(), rows.data()) != ACTTAIL_OK, "read", o);
    expect(acttail_cache_set_length(cache, one) != ACTTAIL_OK, "length", o);
    expect(acttail_cache_truncate(cache, one) != ACTTAIL_OK, "truncate", o);
  }
  // A cache of another model's shape, of as many blocks.
  Options other = o;
  other.kv = acttail::kKvInt8;
  const Decoder stranger(other);
  acttail_engine* theirs = nullptr;
  if (acttail_engine_new(&stranger.model, 1, &theirs) != ACTTAIL_OK) std::abort();
  const int64_t token = 1;
  expect(acttail_engine_forward(theirs, cache, &token, 1, 0, nullptr, nullptr) == ACTTAIL_BAD_ARGUMENT,
         "a cache of another model", o);
  acttail_engine_free(theirs);
  acttail_cache_free(cache);
  acttail_engine_free(engine);
  std::printf("malformed descriptions%s: %d tried, %d of them run\n", routed ? " with experts" : "", tried, ran);
}

#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__)
// In a forked child, where the threads are not, an engine refuses to run and can be freed.
void forked() {
  const Options o;
  const Decoder d(o);
  acttail_engine* engine = nullptr;
  acttail_cache* cache = nullptr;
  if (acttail_engine_new(&d.model, 3, &engine) != ACTTAIL_OK || acttail_cache_new(engine, nullptr, 4, &cache) != ACTTAIL_OK) {
    std::abort();
  }
  const int64_t token = 1;
  if (acttail_engine_forward(engine, cache, &token, 1, 0, nullptr, nullptr) != ACTTAIL_OK) std::abort();
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // a hang ends it by a signal
    const int status = acttail_engine_forward(engine, cache, &token, 1, 0, nullptr, nullptr);
    acttail_cache_free(cache);
    acttail_engine_free(engine);
    _exit(status == ACTTAIL_FAILED ? 0 : 1);
  }
  int status = 0;
  expect(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child", o);
  expect(acttail_engine_forward(engine, cache, &token, 1, 0, nullptr, nullptr) == ACTTAIL_OK, "the parent goes on", o);
  acttail_cache_free(cache);
  acttail_engine_free(engine);
}
#else
void forked() {}
#endif

}  // namespace

int main() {
  for (int32_t format = 0; format < acttail::kQ4K; ++format) {  // those of files: test_kernels
    for (int32_t rule : {ACTTAIL_DENSE, ACTTAIL_TOPK, ACTTAIL_THRESHOLD}) {
      Options o;
      o.format = format;
      o.rule = rule;
      against_truth(o);
      together(o);
      together(o, kWide);
      forks(o);
      long_run(o);
      o.routed = true;
      against_truth(o);
      together(o);
      together(o, kWide);
      forks(o);
      long_run(o);
      all_orders(o);
      o.biased = o.learned = true;
      o.gated = false;
      against_truth(o);
      together(o);
      o.routed = o.biased = o.learned = false;
      o.gated = o.tied = true;
      against_truth(o);
      together(o);
      together(o, kWide);
      o.biased = o.learned = true;
      against_truth(o);
      together(o);
      o.tied = o.biased = o.learned = false;
      o.layer_norm = true;
      o.gated = false;
      o.activation = ACTTAIL_GELU_ERF;
      against_truth(o);
      together(o);
      forks(o);
      o.learned = true;
      against_truth(o);
      together(o);
      o.learned = false;
      o.layer_norm = false;
      o.gated = o.biased = o.one_scale = true;
      o.activation = ACTTAIL_GELU_TANH;
      against_truth(o);
      together(o);
      forks(o);
      all_orders(o);
      o.biased = false;
      all_orders(o);
      o.wina = true;
      o.activation = ACTTAIL_RELU;
      against_truth(o);
      together(o);
      forks(o);
      all_orders(o);
      o.mixed = true;
      against_truth(o);
      together(o);
      forks(o);
      all_orders(o);
      o.wina = false;
      against_truth(o);
      together(o);
      forks(o);
      all_orders(o);
    }
  }
  for (int32_t kv = 1; kv < acttail::kKvFormats; ++kv) {
    Options o;
    o.kv = kv;
    o.layer_norm = true;
    against_truth(o);
    together(o);
    forks(o);
    long_run(o);
  }
  refusals();
  refused_routers();
  refused_batches();
  beyond_positions();
  malformed(false);
  malformed(true);
  forked();
  std::printf("engine (%s): %s\n", acttail_isa(), failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
