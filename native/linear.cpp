// One sparse projection of a few rows, for torch: y = W TopK(x).
#include <algorithm>
#include <cstring>
#include <vector>

#include "guard.hpp"
#include "kernels.hpp"

namespace {

// The rows of W that a vector keeps, with its factors.
struct Kept {
  std::vector<int32_t> index;
  std::vector<float> x;
};

Kept kept(const float* masked, int64_t d) {
  Kept k;
  for (int64_t j = 0; j < d; ++j) {
    if (masked[j] == 0.0f) continue;
    k.index.push_back(static_cast<int32_t>(j));
    k.x.push_back(masked[j]);
  }
  return k;
}

int sparse_linear(const acttail_matrix& m, const float* x, int64_t vectors, int64_t k, float* y,
                  int threads) {
  const acttail::Kernels& kernels = acttail::kernels();
  const int64_t d = m.rows, columns = m.columns;
  std::vector<float> masked(static_cast<size_t>(vectors * d));
  std::vector<int32_t> keys(static_cast<size_t>(d));
  kernels.mask_f32(x, masked.data(), vectors, d, k, keys.data());
  std::vector<Kept> lists;
  int64_t count = 0;
  for (int64_t b = 0; b < vectors; ++b) {
    lists.push_back(kept(masked.data() + b * d, d));
    count += static_cast<int64_t>(lists.back().index.size());
  }
  // Below this many weights a parallel region costs more than it saves.
  if (count * columns < (int64_t{1} << 18)) threads = 1;
  std::vector<float> partial(static_cast<size_t>(threads * vectors * columns), 0.0f);
  std::vector<int32_t> scratch(static_cast<size_t>(vectors > 1 ? threads * acttail::kTogetherScratch : 0));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    acttail::Rows mine[acttail::kMostTogether];
    for (int64_t b = 0; b < vectors; ++b) {
      const Kept& own = lists[static_cast<size_t>(b)];
      const int64_t n = static_cast<int64_t>(own.index.size()), first = n * t / threads, last = n * (t + 1) / threads;
      mine[b] = {own.index.data() + first, own.x.data() + first, last - first, 0};
    }
    float* const to = partial.data() + t * vectors * columns;
    if (vectors == 1) {
      kernels.add_rows(m, mine[0], 0, columns, to);
    } else {
      kernels.add_rows_together(m, mine, vectors, 0, columns, to, columns,
                                scratch.data() + t * acttail::kTogetherScratch);
    }
  }
  std::memcpy(y, partial.data(), sizeof(float) * static_cast<size_t>(vectors * columns));
  for (int t = 1; t < threads; ++t) {
    kernels.accumulate(y, partial.data() + t * vectors * columns, vectors * columns);
  }
  return ACTTAIL_OK;
}

}  // namespace

extern "C" int acttail_sparse_linear(const acttail_matrix* m, const float* x, int64_t vectors, int64_t k,
                                     float* y, int threads) {
  if (m == nullptr || !acttail::usable(*m) || x == nullptr || y == nullptr || vectors < 1 ||
      vectors > acttail::kMostTogether || k < 1 || k > m->rows || threads < 1) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  return acttail::guarded([&] { return sparse_linear(*m, x, vectors, k, y, threads); });
}
