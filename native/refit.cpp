// A table of GGUF blocks [outputs][inputs] as int8 rows with a half-precision scale for every 32 inputs. Levels that are
// of that form are taken as they are; others become floats as the gguf package dequantises them, 256 at a time, and are
// fitted as engine/quantise.py fits eight bits. Compiled without contraction: products and sums round one by one.
#include <algorithm>
#include <cmath>
#include <iterator>

#include "formats.hpp"
#include "gguf_blocks.hpp"
#include "guard.hpp"
#include "half.hpp"

namespace {

using acttail::Block;
using acttail::Kind;
using acttail::kMostInputs;
using acttail::Matrix;

constexpr int kGroup = 32;

void fit(const float* x, int8_t* level, uint16_t* scale) {
  float high = 0;
  for (int i = 0; i < kGroup; ++i) high = std::max(high, std::fabs(x[i]));
  *scale = float_to_half(high / 127);
  const float divisor = std::max(half_to_float(*scale), 1e-30f);
  constexpr float round = 12582912.0f;  // adding it leaves whole numbers, rounded to even
  for (int i = 0; i < kGroup; ++i) {
    const float v = std::min(std::max(x[i] / divisor, -127.0f), 127.0f);
    level[i] = static_cast<int8_t>(static_cast<int>((v + round) - round));
  }
}

// A kind of block and how it becomes floats.
struct Source {
  int32_t type;
  int inputs;  // of a block
  int64_t bytes;
  void (*floats)(const uint8_t*, float*);
};

template <int Type>
constexpr Kind own_kind() {
  for (const Kind& kind : acttail::kKinds) {
    if (kind.type == Type) return kind;
  }
  return {};
}

// Of a kind that a format holds.
template <int Type>
void floats_of(const uint8_t* p, float* out) {
  constexpr Kind kind = own_kind<Type>();
  constexpr acttail::FormatTraits traits = acttail::kFormatTraits[kind.format];
  constexpr bool minima = traits.minimum && !(kind.format == acttail::kInt4 && Type != acttail::kTypeQ41);
  constexpr int zero = kind.format == acttail::kInt4 && !minima ? 8 : minima ? 0 : traits.zero;
  constexpr int inputs = static_cast<int>(kind.inputs), sub = traits.sub ? traits.sub : inputs;
  uint8_t level[kMostInputs];
  Block b{};
  b.level = level;
  kind.read(p, b);
  const float scale = half_to_float(b.scale), minimum = half_to_float(b.minimum);
  for (int g = 0; g < inputs / sub; ++g) {
    float d = scale, m = minimum;
    if (traits.sub) {
      d *= minima ? static_cast<float>(b.sub_scale[g]) : static_cast<float>(static_cast<int8_t>(b.sub_scale[g]));
      m *= -static_cast<float>(b.sub_minimum[g & 7]);
    }
    for (int i = g * sub; i < (g + 1) * sub; ++i) {
      const int whole = kind.format == acttail::kInt8 ? static_cast<int8_t>(level[i]) : level[i] - zero;
      out[i] = d * static_cast<float>(whole);
      if (minima) out[i] += m;
    }
  }
}

void floats_q2_k(const uint8_t* p, float* out) {
  const float d = half_to_float(acttail::half_at(p + 80)), m = half_to_float(acttail::half_at(p + 82));
  for (int g = 0; g < 16; ++g) {
    const uint8_t* q = p + 16 + g / 8 * 32 + g % 2 * 16;
    const float dl = d * static_cast<float>(p[g] & 15), ml = m * static_cast<float>(p[g] >> 4);
    for (int i = 0; i < 16; ++i) out[16 * g + i] = dl * static_cast<float>(q[i] >> (g / 2 % 4 * 2) & 3) - ml;
  }
}

void floats_iq4_xs(const uint8_t* p, float* out) {
  const float d = half_to_float(acttail::half_at(p));
  const uint16_t high = acttail::half_at(p + 2);
  for (int g = 0; g < 8; ++g) {
    const int scale = (p[4 + g / 2] >> (g % 2 * 4) & 15) | (high >> (2 * g) & 3) << 4;
    const float dl = d * static_cast<float>(scale - 32);
    uint8_t level[kGroup];
    acttail::four_bits(p + 8 + 16 * g, level);
    for (int i = 0; i < kGroup; ++i) out[kGroup * g + i] = dl * static_cast<float>(acttail::kIq4Values[level[i]]);
  }
}

void floats_f32(const uint8_t* p, float* out) { std::memcpy(out, p, kGroup * sizeof(float)); }

void floats_f16(const uint8_t* p, float* out) {
  for (int i = 0; i < kGroup; ++i) out[i] = half_to_float(acttail::half_at(p + 2 * i));
}

void floats_bf16(const uint8_t* p, float* out) {
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t bits = static_cast<uint32_t>(acttail::half_at(p + 2 * i)) << 16;
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

// The numbers are ggml's; floats go by 32.
constexpr Source kSources[] = {
    {0, 32, 128, floats_f32},          {1, 32, 64, floats_f16},          {2, 32, 18, floats_of<2>},
    {3, 32, 20, floats_of<3>},         {6, 32, 22, floats_of<6>},        {7, 32, 24, floats_of<7>},
    {8, 32, 34, floats_of<8>},         {10, 256, 84, floats_q2_k},       {11, 256, 110, floats_of<11>},
    {12, 256, 144, floats_of<12>},     {13, 256, 176, floats_of<13>},    {14, 256, 210, floats_of<14>},
    {20, 32, 18, floats_of<20>},       {23, 256, 136, floats_iq4_xs},    {30, 32, 64, floats_bf16},
};

// Of kinds with one scale for 32 and no minimum: the offset of their levels, which fit eight bits.
bool taken(int32_t type, int* zero) {
  *zero = type == 2 ? 8 : type == 6 ? 16 : 0;
  return type == 2 || type == 6 || type == 8 || type == 20;
}

void refit_row(const Source& source, const Kind* kind, int zero, const uint8_t* p, int64_t inputs, int8_t* level,
               uint16_t* scale) {
  float x[kMostInputs];
  uint8_t raw[kMostInputs];
  for (int64_t i = 0; i < inputs; i += source.inputs, p += source.bytes) {
    if (kind) {
      Block b{};
      b.level = raw;
      kind->read(p, b);
      scale[i / kGroup] = b.scale;
      for (int e = 0; e < kGroup; ++e) level[i + e] = static_cast<int8_t>(raw[e] - zero);
      continue;
    }
    source.floats(p, x);
    for (int g = 0; g < source.inputs; g += kGroup) fit(x + g, level + i + g, scale + (i + g) / kGroup);
  }
}

}  // namespace

extern "C" int acttail_refit(const acttail_matrix* m, int64_t inputs, int32_t type, const void* blocks, int threads) {
  const Source* source = std::find_if(std::begin(kSources), std::end(kSources),
                                      [&](const Source& s) { return s.type == type; });
  if (m == nullptr || source == std::end(kSources) || !acttail::usable(*m) || m->format != acttail::kInt8 ||
      m->group != kGroup || blocks == nullptr || inputs < 1 || inputs > m->columns || inputs % source->inputs ||
      threads < 1) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  int zero;
  const Kind* kind = taken(type, &zero) ? acttail::kind_of(type) : nullptr;
  return acttail::guarded([&] {
    const int64_t row_bytes = inputs / source->inputs * source->bytes, scales = m->columns / kGroup;
    const int64_t parts = std::min<int64_t>(m->rows, threads);
    int8_t* const level = static_cast<int8_t*>(const_cast<void*>(m->data));
    uint16_t* const scale = const_cast<uint16_t*>(m->scale);
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1) if (parts > 1)
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t r = m->rows * part / parts; r < m->rows * (part + 1) / parts; ++r) {
        int8_t* const row = level + r * m->columns;
        std::fill(row + inputs, row + m->columns, int8_t{0});
        std::fill(scale + r * scales + inputs / kGroup, scale + (r + 1) * scales, uint16_t{0});
        refit_row(*source, kind, zero, static_cast<const uint8_t*>(blocks) + r * row_bytes, inputs, row,
                  scale + r * scales);
      }
    }
    return ACTTAIL_OK;
  });
}
