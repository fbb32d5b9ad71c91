// Floats [outputs][inputs] into the input-major arrays of a Q4_K matrix (engine.h), fitted by fit.inc.
#include <algorithm>
#include <cstring>
#include <vector>

#include "fit.hpp"
#include "guard.hpp"
#include "kernels.hpp"

namespace {

using acttail::FitBlock;
using acttail::kFitColumns;
using acttail::kFitGroup;
using acttail::kFitInputs;
using acttail::Matrix;
using acttail::writable;

// What a thread works with: weights of a block of columns, and what they are fitted to.
struct Work {
  float x[kFitInputs][kFitColumns];
  FitBlock fitted;
};

// The four bits of one input, in the order of engine.h.
void put_levels(const uint8_t* level, uint8_t* to) {
  for (int lane = 0; lane < 4; ++lane) {
    for (int u = 0; u < 4; ++u) {
      uint32_t below, above;
      std::memcpy(&below, level + 16 * u + 4 * lane, sizeof below);
      std::memcpy(&above, level + 64 + 16 * u + 4 * lane, sizeof above);
      below |= above << 4;
      std::memcpy(to + 16 * lane + 4 * u, &below, sizeof below);
    }
  }
}

// One super-block from input `first` on, into columns `column` to a whole block.
void put(const Matrix& m, const FitBlock& fitted, int64_t first, int64_t inputs, int64_t column) {
  const int64_t super = first / kFitInputs, groups = (inputs + kFitGroup - 1) / kFitGroup;
  std::memcpy(writable<uint16_t>(m.scale) + super * m.columns + column, fitted.scale, sizeof fitted.scale);
  std::memcpy(writable<uint16_t>(m.minimum) + super * m.columns + column, fitted.minimum, sizeof fitted.minimum);
  for (int64_t i = 0; i < inputs; ++i) {
    put_levels(fitted.level[i], writable<uint8_t>(m.data) + (first + i) * m.columns / 2 + column / 2);
  }
  for (int64_t g = 0; g < groups; ++g) {
    std::memcpy(writable<uint8_t>(m.sub_scale) + (first / kFitGroup + g) * m.columns + column, fitted.sub_scale[g],
                sizeof fitted.sub_scale[g]);
  }
  for (int64_t g = 0; g < (groups + 3) / 4 * 4; ++g) {
    uint8_t* to = writable<uint8_t>(m.sub_minimum) + ((first / 128 + g / 4) * m.columns + column) * 4 + g % 4;
    for (int64_t c = 0; c < kFitColumns; ++c) to[4 * c] = g < groups ? fitted.sub_minimum[g][c] : 0;
  }
}

void fit(const Matrix& m, int64_t column, const float* values, int64_t outputs, std::vector<Work>& work) {
  const acttail::Kernels& kernels = acttail::kernels();
  const int64_t tiles = (outputs + kFitColumns - 1) / kFitColumns, parts = static_cast<int64_t>(work.size());
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    Work& own = work[static_cast<size_t>(part)];
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
      const int64_t at = t * kFitColumns, count = std::min(kFitColumns, outputs - at);
      for (int64_t first = 0; first < m.rows; first += kFitInputs) {
        const int64_t inputs = std::min(kFitInputs, m.rows - first);
        for (int64_t i = 0; i < inputs; ++i) std::fill(own.x[i] + count, own.x[i] + kFitColumns, 0.0f);
        for (int64_t c = 0; c < count; ++c) {
          const float* from = values + (at + c) * m.rows + first;
          for (int64_t i = 0; i < inputs; ++i) own.x[i][c] = from[i];
        }
        kernels.fit_block(own.x[0], inputs, own.fitted);
        put(m, own.fitted, first, inputs, column + at);
      }
    }
  }
}

}  // namespace

extern "C" int acttail_fit(const acttail_matrix* m, int64_t column, const float* values, int64_t outputs, int threads) {
  if (m == nullptr || !acttail::usable(*m) || m->format != acttail::kQ4K || values == nullptr || column < 0 ||
      column % kFitColumns || outputs < 1 || outputs > m->columns - column || threads < 1) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  return acttail::guarded([&] {
    const int64_t tiles = (outputs + kFitColumns - 1) / kFitColumns;
    std::vector<Work> work(static_cast<size_t>(std::min<int64_t>(tiles, threads)));
    fit(*m, column, values, outputs, work);
    return ACTTAIL_OK;
  });
}
