// Every kernel of every instruction set that this CPU has, against float64 and against the portable one.
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>

#include "decoder.hpp"
#include "gather.hpp"
#include "kernels.hpp"

namespace {

using namespace acttail;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

int failures = 0, checks = 0;
const Kernels* portable = nullptr;
const char* isa = "";

Floats random_floats(int64_t n, uint32_t seed) {
  Floats x;
  for (int64_t i = 0; i < n; ++i) x.push_back(decoder::unit(decoder::mix(seed, 5, 5, static_cast<uint32_t>(i))));
  return x;
}

// got is within `bound` of the truth, and within twice that of the portable kernel's.
void compare(const char* what, int64_t n, const Floats& got, const Floats& plain, const Doubles& truth, double bound) {
  ++checks;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double off = std::fabs(static_cast<double>(got[i]) - truth[i]);
    const double apart = std::fabs(static_cast<double>(got[i]) - static_cast<double>(plain[i]));
    if (off <= bound && apart <= 2 * bound) continue;
    ++failures;
    std::printf("FAILED (%s): %s of %lld, entry %zu: %g, portable %g, truth %g, bound %g\n", isa, what,
                static_cast<long long>(n), i, static_cast<double>(got[i]), static_cast<double>(plain[i]), truth[i],
                bound);
    return;
  }
}

void expect(bool condition, const char* what, int64_t n) {
  ++checks;
  if (condition) return;
  ++failures;
  std::printf("FAILED (%s): %s of %lld\n", isa, what, static_cast<long long>(n));
}

// Runs `f(kernels, out)` on the set and on the portable one, and compares both with the truth.
template <typename Function>
void check(const Kernels& k, const char* what, int64_t n, size_t size, const Doubles& truth, double bound, Function f) {
  Floats got(size, 0.5f), plain(size, 0.5f);
  f(k, got.data());
  f(*portable, plain.data());
  compare(what, n, got, plain, truth, bound);
  compare("the portable kernel", n, plain, plain, truth, bound);
}

// float32 sums are off by a few 2^-24 of the sum of magnitudes; integer kernels take x in units of 1/16383
// of its largest entry, half of which every product may be off by.
double bound(int32_t format, double magnitudes, double largest_x, double weights) {
  return 4e-6 * magnitudes + 1e-6 + (kFormatTraits[format].scaled ? largest_x / 30000 * weights : 0);
}

// Vectors with lists of their own, all rows and none among them, get bit for bit what each gets alone.
void together(const Kernels& k, const Matrix& m, int64_t begin, int64_t end) {
  std::vector<int32_t> scratch(static_cast<size_t>(kTogetherScratch));
  const auto width = static_cast<size_t>(m.columns);
  for (int64_t batch = 1; batch <= kMostTogether; ++batch) {
    if (m.columns > 4096 && batch != 5) continue;  // more than the scratch holds at a time
    // Out of 16: how many rows each vector keeps. All without a list; all; most; half; few.
    for (uint32_t density : {17u, 16u, 15u, 8u, 2u}) {
      std::vector<std::vector<int32_t>> index(static_cast<size_t>(batch));
      std::vector<Floats> x;
      std::vector<Rows> rows;
      for (int64_t b = 0; b < batch; ++b) {
        auto& own = index[static_cast<size_t>(b)];
        const auto seed = static_cast<uint32_t>(b) + 40;
        for (int64_t i = 0; i < m.rows; ++i) {
          const uint32_t draw = decoder::mix(seed, density, 3, static_cast<uint32_t>(i)) % 16;
          if (draw < density && !(b == 2 && density == 8)) own.push_back(static_cast<int32_t>(i));
        }
        x.push_back(random_floats(m.rows, seed));
        const bool listed = density < 17 && !(b == 1 && density == 15);
        for (size_t i = 0; i < x.back().size(); i += 5) x.back()[i] = 0;  // kept, and still nothing to add
        rows.push_back({listed ? own.data() : nullptr, x.back().data(),
                        listed ? static_cast<int64_t>(own.size()) : m.rows, 0});
      }
      if (density == 17 && m.rows > 40) {
        for (Rows& r : rows) r.first = 33, r.count = m.rows - 33;  // a thread's share
      }
      Floats got(width * static_cast<size_t>(batch), 0.5f), alone(got);
      k.add_rows_together(m, rows.data(), batch, begin, end, got.data(), m.columns, scratch.data());
      for (int64_t b = 0; b < batch; ++b) k.add_rows(m, rows[static_cast<size_t>(b)], begin, end, alone.data() + b * m.columns);
      expect(got == alone, "add_rows_together", density);
    }
  }
}

// What is gathered of every column are the rows' own numbers.
void columns(const Kernels& k, const Matrix& m) {
  const auto width = static_cast<size_t>(m.columns), height = static_cast<size_t>(m.rows);
  Floats all(width * height), column(height);
  for (size_t i = 0; i < height; ++i) k.decode_row(m, static_cast<int64_t>(i), 0, m.columns, all.data() + i * width);
  bool same = true;
  for (size_t j = 0; j < width; ++j) {
    gather_column(m, static_cast<int64_t>(j), column.data());
    for (size_t i = 0; i < height; ++i) same = same && column[i] == all[i * width + j];
  }
  expect(same, "gather_column", m.format);
  // And of some columns of a row.
  const int64_t block = kFormatTraits[m.format].block, first = std::min(block, m.columns - block);
  Floats part(width);
  k.decode_row(m, m.rows / 2, first, m.columns, part.data());
  const float* const whole = all.data() + static_cast<size_t>(m.rows / 2) * width + first;
  expect(std::equal(whole, whole + m.columns - first, part.data()), "decode_row of a part", m.format);
}

void rows(const Kernels& k, int32_t format, int64_t inputs, int64_t outputs, int64_t group) {
  const decoder::Weights w{3, 1, format, group, inputs, outputs};
  const decoder::Packed packed(std::vector<decoder::Weights>{w});
  const Matrix& m = packed.matrix;
  const size_t width = static_cast<size_t>(m.columns);
  for (int64_t step : {0, 1, 2, 7}) {  // 0: all rows, without a list
    std::vector<int32_t> index;
    for (int64_t i = step == 0 ? 0 : inputs / 5; i < inputs; i += std::max<int64_t>(1, step)) {
      index.push_back(static_cast<int32_t>(i));
    }
    const int64_t count = static_cast<int64_t>(index.size());
    const Floats x = random_floats(count, 7);
    Doubles truth(width);
    double magnitudes = 0, weights = 0;
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = 0, sizes = 0, all = 0;
      for (int64_t c = 0; c < count; ++c) {
        const double v = w.value(index[static_cast<size_t>(c)], o);
        const double factor = static_cast<double>(x[static_cast<size_t>(c)]);
        sum += v * factor;
        sizes += (std::fabs(v) + (format == kInt4 ? 0.5 : 0)) * std::fabs(factor);
        all += std::fabs(v) + (format == kInt4 ? 0.5 : 0);
      }
      truth[static_cast<size_t>(o)] = 0.5 + sum;
      magnitudes = std::max(magnitudes, sizes + 0.5);
      weights = std::max(weights, all);
    }
    Floats got(width, 0.5f), plain(width, 0.5f);
    const Rows list{step == 0 ? nullptr : index.data(), x.data(), count, 0};
    k.add_rows(m, list, 0, m.columns, got.data());
    portable->add_rows(m, list, 0, m.columns, plain.data());
    truth.resize(static_cast<size_t>(outputs));  // without the padding
    compare("add_rows", inputs, got, plain, truth, bound(format, magnitudes, 1, weights));
  }
  together(k, m, 0, m.columns);
  if (m.columns > 64 && m.columns % 128 == 0) together(k, m, 64, m.columns);
  columns(k, m);
  for (int64_t i : {int64_t{0}, inputs / 2, inputs - 1}) {
    Doubles truth;
    for (int64_t o = 0; o < outputs; ++o) truth.push_back(w.value(i, o));
    check(k, "decode_row", inputs, width, truth, 1e-6,
          [&](const Kernels& set, float* out) { set.decode_row(m, i, 0, m.columns, out); });
  }
}

// A matrix in a format of GGUF files: transcoded from random blocks under small scales, or fitted to random weights.
struct FileMatrix {
  std::vector<uint8_t> data, plane, sub_scale, sub_minimum, blocks;
  std::vector<uint16_t> scale, minimum;
  acttail_matrix matrix{};
  int status;

  FileMatrix(int32_t format, int64_t inputs, int64_t outputs, bool fitted) {
    const FormatTraits& traits = kFormatTraits[format];
    const int64_t columns = (outputs + traits.block - 1) / traits.block * traits.block;
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    const auto groups = [&](int64_t group) { return (inputs + group - 1) / group; };
    data.resize(size(inputs * columns / 2));
    plane.resize(size(inputs * columns * traits.plane / 8));
    scale.resize(size(groups(traits.group) * columns));
    if (traits.minimum) minimum.resize(scale.size());
    if (traits.sub) sub_scale.resize(size(groups(traits.sub) * columns));
    if (traits.sub && traits.minimum) sub_minimum.resize(size(groups(128) * columns * 4));
    const auto pointer = [](auto& array) { return array.empty() ? nullptr : array.data(); };
    matrix = {format,         traits.group,     inputs,         columns,           data.data(),
              scale.data(),   pointer(minimum), pointer(plane), pointer(sub_scale), pointer(sub_minimum),
              0,              0};
    if (fitted) {
      status = acttail_fit(&matrix, 0, random_floats(inputs * outputs, 9).data(), outputs, 2);
      return;
    }
    constexpr int64_t bytes[] = {144, 176, 210, 22, 24};
    blocks.resize(size(outputs * inputs / traits.group * bytes[format - kQ4K]));
    for (size_t i = 0; i < blocks.size(); ++i) {
      // Below 0x40, so that no half is large whatever two bytes make one.
      blocks[i] = static_cast<uint8_t>(decoder::mix(6, 1, 2, static_cast<uint32_t>(i)) & 0x2F);
    }
    constexpr int32_t types[] = {12, 13, 14, 6, 7};  // ggml's
    status = acttail_transcode(&matrix, 0, types[format - kQ4K], blocks.data(), outputs, nullptr, 2);
  }
};

void file_rows(const Kernels& k, int32_t format, int64_t inputs, int64_t outputs, bool fitted = false) {
  const FileMatrix file(format, inputs, outputs, fitted);
  expect(file.status == ACTTAIL_OK, fitted ? "fit" : "transcode", outputs);
  const Matrix& m = file.matrix;
  const size_t width = static_cast<size_t>(m.columns);
  Floats row(width), same(width);
  for (int64_t step : {0, 1, 3, 50}) {  // 0: all rows, without a list
    std::vector<int32_t> index;
    for (int64_t i = 0; i < inputs; i += std::max<int64_t>(1, step)) index.push_back(static_cast<int32_t>(i));
    const int64_t count = static_cast<int64_t>(index.size());
    const Floats x = random_floats(count, 8);
    Doubles truth(width, 0.5), sizes(truth.size());
    for (int64_t c = 0; c < count; ++c) {
      k.decode_row(m, index[static_cast<size_t>(c)], 0, m.columns, row.data());
      portable->decode_row(m, index[static_cast<size_t>(c)], 0, m.columns, same.data());
      expect(row == same, "decode_row", outputs);
      const double factor = static_cast<double>(x[static_cast<size_t>(c)]);
      for (size_t j = 0; j < width; ++j) {
        truth[j] += factor * static_cast<double>(row[j]);
        sizes[j] += std::fabs(factor * static_cast<double>(row[j]));
      }
    }
    // Steps of 1/8191 of the largest entry, fewer where many are of one size; tests/engine/test_blocks.py
    // counts them.
    const double limit = 1e-3 * *std::max_element(sizes.begin(), sizes.end()) + 1e-6;
    check(k, "add_rows of a file's format", outputs, truth.size(), truth, limit, [&](const Kernels& kernels, float* y) {
      kernels.add_rows(m, {step == 0 ? nullptr : index.data(), x.data(), count, 0}, 0, m.columns, y);
    });
  }
  together(k, m, 0, m.columns);
  columns(k, m);
}

void dots(const Kernels& k, int32_t format, int64_t inputs, int64_t outputs, int64_t group) {
  const decoder::Weights w{4, 2, format, group, inputs, outputs};
  const decoder::Packed packed(w);
  const Matrix& m = packed.matrix;
  Floats x = random_floats(inputs, 8);
  x.resize(static_cast<size_t>(m.columns));
  std::vector<uint8_t> scratch(static_cast<size_t>(dot_scratch(m.columns)));
  Doubles truth;
  double magnitudes = 0, weights = 0;
  for (int64_t o = 0; o < outputs; ++o) {
    double sum = 0, sizes = 0, all = 0;
    for (int64_t i = 0; i < inputs; ++i) {
      const double v = w.value(i, o), factor = static_cast<double>(x[static_cast<size_t>(i)]);
      sum += v * factor;
      sizes += (std::fabs(v) + (format == kInt4 ? 0.5 : 0)) * std::fabs(factor);
      all += std::fabs(v);
    }
    truth.push_back(sum);
    magnitudes = std::max(magnitudes, sizes);
    weights = std::max(weights, all);
  }
  check(k, "dot_rows", inputs, truth.size(), truth, bound(format, magnitudes, 1, weights),
        [&](const Kernels& set, float* y) { set.dot_rows(m, x.data(), 0, outputs, y, scratch.data()); });
  for (int64_t batch = 1; batch <= kMostTogether; ++batch) {
    std::vector<uint8_t> room(static_cast<size_t>(batch * dot_scratch(m.columns)));
    std::vector<Floats> xs, got, alone;
    std::vector<const float*> from;
    std::vector<float*> to;
    for (int64_t b = 0; b < batch; ++b) {
      xs.push_back(random_floats(inputs, static_cast<uint32_t>(50 + b)));
      xs.back().resize(static_cast<size_t>(m.columns));
      if (b == 2) xs.back()[1] = std::numeric_limits<float>::infinity();
    }
    got.assign(xs.size(), Floats(static_cast<size_t>(outputs), 0.5f));
    alone = got;
    for (size_t b = 0; b < xs.size(); ++b) {
      from.push_back(xs[b].data());
      to.push_back(got[b].data());
      k.dot_rows(m, xs[b].data(), 1, outputs, alone[b].data(), scratch.data());
    }
    k.dot_rows_together(m, from.data(), batch, 1, outputs, to.data(), room.data());
    for (size_t b = 0; b < xs.size(); ++b) {
      expect(std::memcmp(got[b].data(), alone[b].data(), sizeof(float) * got[b].size()) == 0, "dot_rows_together", inputs);
    }
  }
  Doubles row;
  for (int64_t i = 0; i < inputs; ++i) row.push_back(w.value(i, outputs / 2));
  check(k, "decode_dot_row", inputs, static_cast<size_t>(m.columns), row, 1e-6,
        [&](const Kernels& set, float* out) { set.decode_dot_row(m, outputs / 2, out); });
}

void vectors(const Kernels& k, int64_t n) {
  const size_t size = static_cast<size_t>(n);
  Floats x = random_floats(n, 1), w = random_floats(n, 2), b = random_floats(n, 3);
  for (float& v : x) v *= 6;
  double mean = 0, square = 0, spread = 0;
  for (float v : x) mean += static_cast<double>(v), square += static_cast<double>(v) * static_cast<double>(v);
  mean /= static_cast<double>(n);
  for (float v : x) spread += (static_cast<double>(v) - mean) * (static_cast<double>(v) - mean);
  Doubles rms, layer, layer_bias, capped, added, act[4], gated[4];
  for (size_t i = 0; i < size; ++i) {
    const double v = static_cast<double>(x[i]), weight = static_cast<double>(w[i]), shift = static_cast<double>(b[i]);
    rms.push_back(v * weight / std::sqrt(square / static_cast<double>(n) + 1e-3));
    layer.push_back((v - mean) * weight / std::sqrt(spread / static_cast<double>(n) + 1e-3));
    layer_bias.push_back(layer.back() + shift);
    capped.push_back(2 * std::tanh(v / 2));
    added.push_back(v + weight);
    const double found[] = {v / (1 + std::exp(-v)),
                            0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))),
                            0.5 * v * (1 + std::erf(v * 0.7071067811865476)), std::max(v, 0.0)};
    for (int kind = 0; kind < 4; ++kind) act[kind].push_back(found[kind]), gated[kind].push_back(found[kind] * weight);
  }
  check(k, "rms_norm", n, size, rms, 1e-5,
        [&](const Kernels& set, float* y) { set.rms_norm(x.data(), w.data(), n, 1e-3f, y); });
  check(k, "layer_norm", n, size, layer, 2e-4,
        [&](const Kernels& set, float* y) { set.layer_norm(x.data(), w.data(), nullptr, n, 1e-3f, y); });
  check(k, "layer_norm in place", n, size, layer_bias, 2e-4, [&](const Kernels& set, float* y) {
    std::copy(x.begin(), x.end(), y);
    set.layer_norm(y, w.data(), b.data(), n, 1e-3f, y);
  });
  for (int32_t kind = 0; kind < 4; ++kind) {
    check(k, "activate", n, size, act[kind], 4e-6,
          [&](const Kernels& set, float* y) { set.activate(x.data(), nullptr, n, kind, y); });
    check(k, "activate", n, size, gated[kind], 4e-6,
          [&](const Kernels& set, float* y) { set.activate(x.data(), w.data(), n, kind, y); });
  }
  check(k, "softcap", n, size, capped, 1e-6, [&](const Kernels& set, float* y) {
    std::copy(x.begin(), x.end(), y);
    set.softcap(y, n, 2.0f);
  });
  check(k, "accumulate", n, size, added, 1e-6, [&](const Kernels& set, float* y) {
    std::copy(x.begin(), x.end(), y);
    set.accumulate(y, w.data(), n);
  });
  const int64_t half = n / 2;
  Doubles turned(static_cast<size_t>(2 * half));
  Floats cos, sin;
  for (size_t i = 0; i < static_cast<size_t>(half); ++i) {
    cos.push_back(std::cos(w[i]));
    sin.push_back(std::sin(w[i]));
    const double c = static_cast<double>(cos[i]), s = static_cast<double>(sin[i]);
    const double a = static_cast<double>(x[i]), d = static_cast<double>(x[i + static_cast<size_t>(half)]);
    turned[i] = a * c - d * s;
    turned[i + static_cast<size_t>(half)] = d * c + a * s;
  }
  check(k, "rope", n, size, turned, 2e-6, [&](const Kernels& set, float* y) {
    std::copy(x.begin(), x.end(), y);
    set.rope(y, cos.data(), sin.data(), half);
  });
}

// Selection is exact: the same keys, the same cut, the same list.
void selection(const Kernels& k, int64_t n) {
  Floats x = random_floats(n, 11), scale = random_floats(n, 12);
  if (n > 3) x[2] = std::nanf(""), x[3] = -INFINITY;
  const float* no_scale = nullptr;
  for (const float* s : {no_scale, static_cast<const float*>(scale.data())}) {
    std::vector<int32_t> keys(static_cast<size_t>(n)), plain(static_cast<size_t>(n));
    k.magnitude_keys(x.data(), s, n, keys.data());
    portable->magnitude_keys(x.data(), s, n, plain.data());
    expect(keys == plain, "magnitude_keys", n);
    for (int64_t count : {int64_t{1}, n / 2 + 1, n}) {
      count = std::min(count, n);
      std::vector<int32_t> sorted = keys;
      std::sort(sorted.begin(), sorted.end(), std::greater<int32_t>());
      int64_t at_least = 0;
      const int32_t cut = k.kth_largest(keys.data(), n, count, &at_least);
      expect(at_least == count && cut <= sorted[static_cast<size_t>(count - 1)] &&
                 (count == n || cut > sorted[static_cast<size_t>(count)]),
             "kth_largest", n);
      for (int64_t high : {int64_t{1} << 31, int64_t{sorted[0]}}) {
        std::vector<int32_t> index(static_cast<size_t>(n + 16));
        Floats value(static_cast<size_t>(n + 16));
        const int64_t found = k.gather(keys.data(), x.data(), n, cut, high, index.data(), value.data());
        int64_t next = 0;
        bool same = true;
        for (int64_t i = 0; i < n; ++i) {
          if (keys[static_cast<size_t>(i)] < cut || keys[static_cast<size_t>(i)] >= high) continue;
          same = same && next < found && index[static_cast<size_t>(next)] == i &&
                 std::memcmp(&value[static_cast<size_t>(next)], &x[static_cast<size_t>(i)], 4) == 0;
          ++next;
        }
        expect(same && next == found, "gather", n);
      }
    }
  }
}

void attention(const Kernels& k, int32_t format, int64_t width, int64_t length, int64_t first) {
  const size_t bytes = static_cast<size_t>(width * kKvTraits[format].bytes);
  std::vector<uint8_t> keys(bytes * static_cast<size_t>(length)), values(keys.size());
  Floats key_scale(static_cast<size_t>(length)), value_scale(key_scale.size());
  std::vector<Floats> kept_keys, kept_values;
  for (int64_t t = 0; t < length; ++t) {
    for (auto [slab, scales, kept, seed] : {std::tuple(&keys, &key_scale, &kept_keys, 20u),
                                            std::tuple(&values, &value_scale, &kept_values, 21u)}) {
      const Floats x = random_floats(width, seed + 2 * static_cast<uint32_t>(t));
      uint8_t* at = slab->data() + bytes * static_cast<size_t>(t);
      float* scale = &(*scales)[static_cast<size_t>(t)];
      k.encode_kv(format, x.data(), width, at, scale);
      std::vector<uint8_t> plain(bytes);
      float plain_scale = *scale;
      portable->encode_kv(format, x.data(), width, plain.data(), &plain_scale);
      expect(std::memcmp(at, plain.data(), bytes) == 0 && *scale == plain_scale, "encode_kv", width);
      Floats back(static_cast<size_t>(width));
      k.decode_kv(format, at, kKvTraits[format].scaled ? *scale : 1.0f, width, back.data());
      const double limit = format == kKvF32 ? 0 : format == kKvBf16 ? 1.0 / 256 : 1.0 / 250;
      compare("decode_kv", width, back, back, Doubles(x.begin(), x.end()), limit);
      kept->push_back(back);
    }
  }
  KvHead kv{};
  kv.format = format;
  kv.width = width;
  kv.first = first;
  kv.length = length;
  const size_t slab = kPage * bytes, scales = kPage * sizeof(float);
  std::vector<std::vector<uint8_t>> pages;
  std::vector<uint8_t*> starts;
  for (int64_t t = 0; t < length; ++t) {
    const size_t at = static_cast<size_t>(t), in = static_cast<size_t>(t % kPage);
    if (in == 0) pages.emplace_back(2 * (slab + scales));
    uint8_t* const page = pages.back().data();
    std::memcpy(page + in * bytes, &keys[at * bytes], bytes);
    std::memcpy(page + slab + in * bytes, &values[at * bytes], bytes);
    std::memcpy(page + 2 * slab + in * sizeof(float), &key_scale[at], sizeof(float));
    std::memcpy(page + 2 * slab + scales + in * sizeof(float), &value_scale[at], sizeof(float));
  }
  for (auto& page : pages) starts.push_back(page.data());
  kv.pages = starts.data();
  kv.values = static_cast<int64_t>(slab);
  kv.scaled = kKvTraits[format].scaled;
  kv.key_scales = static_cast<int64_t>(2 * slab);
  kv.value_scales = static_cast<int64_t>(2 * slab + scales);
  kv.last_key = keys.data() + bytes * static_cast<size_t>(length - 1);
  kv.last_value = values.data() + bytes * static_cast<size_t>(length - 1);
  kv.last_key_scale = key_scale.back();
  kv.last_value_scale = value_scale.back();
  for (int64_t heads : {1, 2, 3, 5, 7}) {
    const Floats queries = random_floats(heads * width, 30);
    for (float cap : {0.0f, 1.5f}) {
      Doubles truth;
      for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
        Doubles weight;
        double total = 0;
        for (size_t t = static_cast<size_t>(first); t < static_cast<size_t>(length); ++t) {
          double s = 0;
          for (size_t i = 0; i < static_cast<size_t>(width); ++i) {
            s += static_cast<double>(queries[h * static_cast<size_t>(width) + i]) * static_cast<double>(kept_keys[t][i]);
          }
          s *= 0.5;
          if (cap > 0) s = static_cast<double>(cap) * std::tanh(s / static_cast<double>(cap));
          weight.push_back(std::exp(s));
          total += weight.back();
        }
        for (size_t i = 0; i < static_cast<size_t>(width); ++i) {
          double sum = 0;
          for (size_t t = 0; t < weight.size(); ++t) {
            sum += weight[t] / total * static_cast<double>(kept_values[t + static_cast<size_t>(first)][i]);
          }
          truth.push_back(sum);
        }
      }
      Floats scores(static_cast<size_t>(length * kMostHeads));
      check(k, "attend", length, truth.size(), truth, 1e-5, [&](const Kernels& set, float* out) {
        set.attend(kv, queries.data(), heads, 0.5f, cap, scores.data(), out);
      });
    }
  }
}

// A fit is the same, bit for bit, whatever set it is made with.
void fits(const Kernels& k, int64_t inputs) {
  const Floats x = random_floats(inputs * kFitColumns, 10);
  auto got = std::make_unique<FitBlock>(), plain = std::make_unique<FitBlock>();
  k.fit_block(x.data(), inputs, *got);
  portable->fit_block(x.data(), inputs, *plain);
  const auto same = [](const auto& a, const auto& b, int64_t rows) {
    return std::memcmp(a, b, sizeof a[0] * static_cast<size_t>(rows)) == 0;
  };
  const int64_t groups = (inputs + kFitGroup - 1) / kFitGroup;
  expect(same(got->level, plain->level, inputs) && same(got->sub_scale, plain->sub_scale, groups) &&
             same(got->sub_minimum, plain->sub_minimum, groups) && same(got->scale, plain->scale, kFitColumns) &&
             same(got->minimum, plain->minimum, kFitColumns),
         "fit_block", inputs);
}

}  // namespace

int main() {
  for (const InstructionSet& set : instruction_sets()) portable = &set.kernels();  // the last one
  int sets = 0;
  for (const InstructionSet& set : instruction_sets()) {
    isa = set.name;
    if (!set.supported()) {
      std::printf("kernels (%s): not on this CPU\n", isa);
      continue;
    }
    ++sets;
    const Kernels& k = set.kernels();
    expect(std::strcmp(k.name, set.name) == 0, "name", 0);
    for (int32_t format = kQ4K; format < kFormats; ++format) {
      for (int64_t outputs : {1, 300, 16600}) file_rows(k, format, 512, outputs);
    }
    for (int64_t inputs : {1, 67, 320, 512, 576}) {
      file_rows(k, kQ4K, inputs, 130, true);
      fits(k, std::min(inputs, kFitInputs));
    }
    for (int32_t format = 0; format < kQ4K; ++format) {
      for (int64_t group : {32, 64, 1000}) {
        if (!kFormatTraits[format].scaled && group != 32) continue;
        rows(k, format, 1, 1, group);
        rows(k, format, 67, 130, group);
        rows(k, format, 200, 300, group);
        for (int64_t inputs : {1, 67, 576}) dots(k, format, inputs, 37, std::min(group, padded(inputs)));
      }
    }
    for (int64_t n : {1, 7, 16, 31, 576}) {
      vectors(k, n);
      selection(k, n);
    }
    for (int32_t format = 0; format < kKvFormats; ++format) {
      attention(k, format, 16, 1, 0);
      attention(k, format, 80, 6, 0);
      attention(k, format, 128, 37, 5);
      attention(k, format, 64, 97, 40);
    }
  }
  std::printf("kernels: %d checks on %d instruction sets, %d failures\n", checks, sets, failures);
  return failures == 0 ? 0 : 1;
}
