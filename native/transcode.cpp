// GGUF blocks [outputs][inputs] into the input-major arrays of engine.h, number by number: nothing is rounded.
#include <algorithm>
#include <cstring>

#include "formats.hpp"
#include "gguf_blocks.hpp"
#include "guard.hpp"

namespace {

using acttail::Block;
using acttail::Kind;
using acttail::kMostInputs;
using acttail::Matrix;
using acttail::writable;

constexpr int64_t kTile = 128;  // outputs at a time

// One block of inputs of a tile of outputs, on its way.
struct Tile {
  alignas(64) uint8_t level[kTile][kMostInputs];
  alignas(64) uint32_t word[kMostInputs][16];
  uint16_t scale[kTile], minimum[kTile];
  uint8_t sub_scale[16][kTile], sub_minimum[2][kTile][4];

  // Columns that no output takes are zero, which is the level `middle`.
  void clear(int64_t from, int middle) {
    const auto zero = [&](auto& array) {
      std::memset(static_cast<void*>(array + from), 0, sizeof array[0] * static_cast<size_t>(kTile - from));
    };
    std::memset(level + from, middle, sizeof level[0] * static_cast<size_t>(kTile - from));
    zero(scale);
    zero(minimum);
    for (auto& row : sub_scale) zero(row);
    for (auto& row : sub_minimum) zero(row);
  }

  void read(const Kind& kind, const uint8_t* block, int64_t column) {
    Block b{};
    b.level = level[column];
    kind.read(block, b);
    scale[column] = b.scale;
    minimum[column] = b.minimum;
    for (int g = 0; g < 16; ++g) sub_scale[g][column] = b.sub_scale[g];
    for (int g = 0; g < 8; ++g) sub_minimum[g / 4][column][g % 4] = b.sub_minimum[g];
  }

  // The bytes of `data`: four at a time, which lie together in a row and are four neighbouring outputs.
  void four_bits(int inputs) {
    for (int lane = 0; lane < 4; ++lane) {
      for (int u = 0; u < 4; ++u) {
        const uint8_t(*below)[kMostInputs] = level + 16 * u + 4 * lane;
        const uint8_t(*above)[kMostInputs] = below + 64;
        for (int i = 0; i < inputs; ++i) {
          uint32_t four = 0;
          for (int e = 0; e < 4; ++e) {
            four |= static_cast<uint32_t>((below[e][i] & 15) | (above[e][i] & 15) << 4) << (8 * e);
          }
          word[i][4 * lane + u] = four;
        }
      }
    }
  }

  // The bytes of an int8 matrix of so many columns: levels as they are.
  void bytes(uint8_t* to, int64_t row_bytes, int inputs, int64_t width) const {
    for (int i = 0; i < inputs; ++i, to += row_bytes) {
      for (int64_t c = 0; c < width; ++c) to[c] = level[c][i];
    }
  }

  // Of an int4 matrix: the lower 32 columns of 64 below, the upper above.
  void nibbles(uint8_t* to, int64_t row_bytes, int inputs, int64_t width) const {
    for (int i = 0; i < inputs; ++i, to += row_bytes) {
      for (int64_t c = 0; c < width; c += 64) {
        for (int64_t e = 0; e < 32; ++e) {
          to[c / 2 + e] = static_cast<uint8_t>((level[c + e][i] & 15) | level[c + 32 + e][i] << 4);
        }
      }
    }
  }

  // The bytes of `plane`, likewise; returns how many words a row has.
  template <int Bits>
  int upper_bits(int inputs) {
    constexpr int lanes = Bits == 1 ? 1 : 2;  // of a row
    for (int lane = 0; lane < lanes; ++lane) {
      for (int u = 0; u < 4; ++u) {
        for (int i = 0; i < inputs; ++i) {
          uint32_t four = 0;
          for (int other = 0; other < 4 / lanes; ++other) {
            const int column = 16 * u + 4 * (lane + lanes * other), shift = 2 * Bits * other;
            for (int e = 0; e < 4; ++e) {
              const uint32_t below = level[column + e][i] >> 4, above = level[64 + column + e][i] >> 4;
              four |= (below | above << Bits) << (shift + 8 * e);
            }
          }
          word[i][4 * lane + u] = four;
        }
      }
    }
    return 4 * lanes;
  }
};

// The arrays that a tile goes to; `first` is its first input, `column` its first column.
void write(const Matrix& m, Tile& tile, int inputs, int64_t first, int64_t column, int64_t width) {
  const acttail::FormatTraits& traits = acttail::kFormatTraits[m.format];
  const int64_t at = first / inputs * m.columns + column;
  const size_t halves = sizeof tile.scale[0] * static_cast<size_t>(width);
  std::memcpy(writable<uint16_t>(m.scale) + at, tile.scale, halves);
  if (m.minimum) std::memcpy(writable<uint16_t>(m.minimum) + at, tile.minimum, halves);
  if (!acttail::of_file(m.format)) {
    const int64_t row_bytes = acttail::row_bytes(m);
    uint8_t* to = writable<uint8_t>(m.data) + first * row_bytes + column * traits.bits / 8;
    return traits.bits == 8 ? tile.bytes(to, row_bytes, inputs, width) : tile.nibbles(to, row_bytes, inputs, width);
  }
  const auto rows = [&](const void* to, int64_t row_bytes, int64_t offset, int words) {
    uint8_t* p = writable<uint8_t>(to) + first * row_bytes + offset;
    for (int i = 0; i < inputs; ++i, p += row_bytes) std::memcpy(p, tile.word[i], 4 * static_cast<size_t>(words));
  };
  tile.four_bits(inputs);
  rows(m.data, m.columns / 2, column / 2, 16);
  if (traits.plane) {
    const int words = traits.plane == 1 ? tile.upper_bits<1>(inputs) : tile.upper_bits<2>(inputs);
    rows(m.plane, m.columns * traits.plane / 8, column * traits.plane / 8, words);
  }
  if (traits.sub == 0) return;
  for (int g = 0; g < inputs / traits.sub; ++g) {
    uint8_t* to = writable<uint8_t>(m.sub_scale) + (first / traits.sub + g) * m.columns + column;
    std::memcpy(to, tile.sub_scale[g], kTile);
  }
  for (int g = 0; traits.minimum && g < inputs / 128; ++g) {
    uint8_t* to = writable<uint8_t>(m.sub_minimum) + ((first / 128 + g) * m.columns + column) * 4;
    std::memcpy(to, tile.sub_minimum[g], sizeof tile.sub_minimum[g]);
  }
}

void transcode(const Matrix& m, const Kind& kind, int64_t column, const uint8_t* blocks, int64_t outputs,
               const int64_t* order, int threads) {
  const int inputs = static_cast<int>(kind.inputs);
  const int64_t across = m.rows / kind.inputs, tiles = (outputs + kTile - 1) / kTile;
  const int64_t parts = std::min<int64_t>(tiles, threads), block = acttail::kFormatTraits[m.format].block;
  const int middle = m.format == acttail::kInt4 && m.minimum == nullptr ? 8 : 0;
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    Tile tile;
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
      const int64_t first = t * kTile, count = std::min(kTile, outputs - first);
      const int64_t width = (count + block - 1) / block * block;
      tile.clear(count, middle);
      for (int64_t b = 0; b < across; ++b) {
        for (int64_t c = 0; c < count; ++c) {
          const int64_t output = order ? order[first + c] : first + c;
          tile.read(kind, blocks + (output * across + b) * kind.bytes, c);
        }
        write(m, tile, inputs, b * kind.inputs, column + first, width);
      }
    }
  }
}

}  // namespace

extern "C" int acttail_transcode(const acttail_matrix* m, int64_t column, int32_t type, const void* blocks,
                                 int64_t outputs, const int64_t* order, int threads) {
  const Kind* kind = acttail::kind_of(type);
  if (m == nullptr || kind == nullptr || !acttail::usable(*m) || m->format != kind->format ||
      m->group != kind->inputs || m->rows % kind->inputs || blocks == nullptr || column < 0 ||
      column % acttail::kFormatTraits[m->format].block || outputs < 1 || outputs > m->columns - column ||
      threads < 1) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  // Of int4 it is the kind that says whether there are minima.
  if (m->format == acttail::kInt4 && (m->minimum != nullptr) != (type == acttail::kTypeQ41)) return ACTTAIL_BAD_ARGUMENT;
  for (int64_t i = 0; order != nullptr && i < outputs; ++i) {
    if (order[i] < 0 || order[i] >= outputs) return ACTTAIL_BAD_ARGUMENT;
  }
  return acttail::guarded([&] {
    transcode(*m, *kind, column, static_cast<const uint8_t*>(blocks), outputs, order, threads);
    return ACTTAIL_OK;
  });
}
