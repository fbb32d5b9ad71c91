// Picks the instruction set once per process and spreads rows over threads.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "acttail.h"
#include "kernels.hpp"

namespace {

bool known(const char* name) {
  for (const char* isa : {"avx512vnni", "avx512", "avx2", "neon", "portable"}) {
    if (std::strcmp(name, isa) == 0) return true;
  }
  return false;
}

// Best first. A forced name skips the better ones, never the check that the CPU has it.
const acttail::Kernels& choose() {
  const char* forced = std::getenv("ACTTAIL_ISA");
  bool open = forced == nullptr || *forced == '\0' || !known(forced);
#if defined(ACTTAIL_AVX512VNNI)
  open = open || std::strcmp(forced, "avx512vnni") == 0;
  if (open && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
    return acttail::kernels_avx512vnni();
  }
#endif
#if defined(ACTTAIL_AVX512)
  open = open || std::strcmp(forced, "avx512") == 0;
  if (open && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return acttail::kernels_avx512();
  }
#endif
#if defined(ACTTAIL_AVX2)
  open = open || std::strcmp(forced, "avx2") == 0;
  if (open && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return acttail::kernels_avx2();
  }
#endif
#if defined(ACTTAIL_NEON)
  open = open || std::strcmp(forced, "neon") == 0;
  if (open) return acttail::kernels_neon();
#endif
  (void)open;
  return acttail::kernels_portable();
}

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
  if (rows * columns < kParallelEntries) threads = 1;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(rows, threads));
  Key* scratch = new (std::nothrow) Key[static_cast<size_t>(parts * columns)];
  if (scratch == nullptr) return ACTTAIL_OUT_OF_MEMORY;
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = rows * part / parts;
    const int64_t last = rows * (part + 1) / parts;
    kernel(x + first * columns, y + first * columns, last - first, scratch + part * columns);
  }
  delete[] scratch;
  return ACTTAIL_OK;
}

}  // namespace

namespace acttail {

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace acttail

extern "C" {

int acttail_abi(void) { return ACTTAIL_ABI; }

const char* acttail_isa(void) { return acttail::kernels().name; }

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
