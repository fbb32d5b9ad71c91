// Exact TopK masks of rows spread over threads.
#include <algorithm>
#include <cstring>
#include <memory>

#include "guard.hpp"
#include "kernels.hpp"

namespace {

// Below this many entries a parallel region costs more than it saves (about 5 µs on two cores).
constexpr int64_t kParallelEntries = 1 << 15;

template <typename Key, typename Value, typename Kernel>
int run_rows(const Value* x, Value* y, int64_t rows, int64_t columns, int64_t k, int threads,
             Kernel kernel) {
  if (x == nullptr || y == nullptr || rows < 0 || columns < 1 || k < 1 || k > columns ||
      threads < 1) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  if (k == columns) {
    std::memcpy(y, x, sizeof(Value) * static_cast<size_t>(rows * columns));
    return ACTTAIL_OK;
  }
  return acttail::guarded([&] {
    const int64_t limit = rows * columns < kParallelEntries ? 1 : threads;
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(rows, limit));
    std::unique_ptr<Key[]> scratch(new Key[static_cast<size_t>(parts * columns)]);
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1) if (parts > 1)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = rows * part / parts;
      const int64_t last = rows * (part + 1) / parts;
      kernel(x + first * columns, y + first * columns, last - first, scratch.get() + part * columns);
    }
    return ACTTAIL_OK;
  });
}

}  // namespace

extern "C" {

int acttail_topk_mask_f32(const float* x, float* y, int64_t rows, int64_t columns, int64_t k,
                          int threads) {
  return run_rows<int32_t>(x, y, rows, columns, k, threads,
                           [&](const float* xs, float* ys, int64_t n, int32_t* scratch) {
                             acttail::kernels().mask_f32(xs, ys, n, columns, k, scratch);
                           });
}

int acttail_topk_mask_16(const uint16_t* x, uint16_t* y, int64_t rows, int64_t columns, int64_t k,
                         uint16_t infinity, int threads) {
  return run_rows<int16_t>(x, y, rows, columns, k, threads,
                           [&](const uint16_t* xs, uint16_t* ys, int64_t n, int16_t* scratch) {
                             acttail::kernels().mask_16(xs, ys, n, columns, k, infinity, scratch);
                           });
}

}  // extern "C"
