// One sparse projection of a few rows, for torch: y = W TopK(x).
#include <algorithm>
#include <cstring>
#include <vector>

#include "guard.hpp"
#include "kernels.hpp"

namespace {

// The rows of W that any of the vectors keeps, with each vector's factor (0 where it does not).
struct Union {
  std::vector<int32_t> index;
  std::vector<float> x;  // [count][batch]
};

Union unite(const std::vector<float>& masked, int64_t vectors, int64_t d) {
  Union u;
  for (int64_t j = 0; j < d; ++j) {
    bool any = false;
    for (int64_t b = 0; b < vectors; ++b) any = any || masked[static_cast<size_t>(b * d + j)] != 0.0f;
    if (!any) continue;
    u.index.push_back(static_cast<int32_t>(j));
    for (int64_t b = 0; b < vectors; ++b) u.x.push_back(masked[static_cast<size_t>(b * d + j)]);
  }
  return u;
}

int sparse_linear(const acttail_matrix& m, const float* x, int64_t vectors, int64_t k, float* y,
                  int threads) {
  const acttail::Kernels& kernels = acttail::kernels();
  const int64_t d = m.rows, columns = m.columns;
  std::vector<float> masked(static_cast<size_t>(vectors * d));
  std::vector<int32_t> keys(static_cast<size_t>(d));
  kernels.mask_f32(x, masked.data(), vectors, d, k, keys.data());
  const Union u = unite(masked, vectors, d);
  const int64_t count = static_cast<int64_t>(u.index.size());
  // Below this many weights a parallel region costs more than it saves.
  if (count * columns < (int64_t{1} << 18)) threads = 1;
  std::vector<float> partial(static_cast<size_t>(threads * vectors * columns), 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    const int64_t first = count * t / threads, last = count * (t + 1) / threads;
    if (first == last) continue;
    const acttail::Rows mine{u.index.data() + first, u.x.data() + first * vectors, last - first, 0};
    kernels.add_rows(m, mine, 0, columns, partial.data() + t * vectors * columns, vectors, columns);
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
      vectors > 8 || k < 1 || k > m->rows || threads < 1) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  return acttail::guarded([&] { return sparse_linear(*m, x, vectors, k, y, threads); });
}
