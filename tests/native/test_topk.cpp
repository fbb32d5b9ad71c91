// Exact TopK against a sort, over odd shapes and nasty values; run under sanitizers by `make check`.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "acttail.h"

namespace {

int failures = 0;

void expect(bool condition, const char* what, int64_t d, int64_t k) {
  if (!condition) {
    ++failures;
    std::printf("FAILED: %s (d=%lld, k=%lld)\n", what, static_cast<long long>(d),
                static_cast<long long>(k));
  }
}

uint32_t key(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::min(bits & 0x7FFFFFFFu, 0x7F800001u);
}

std::vector<float> by_sorting(const std::vector<float>& x, int64_t k) {
  std::vector<int64_t> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return key(x[a]) > key(x[b]); });
  std::vector<float> y(x.size(), 0.0f);
  for (int64_t i = 0; i < k; ++i) y[order[i]] = x[order[i]];
  return y;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  int cases = 0;
  for (int64_t d : {1, 2, 3, 15, 16, 17, 63, 65, 576, 1537}) {
    for (int64_t k : {int64_t{1}, d / 3 + 1, d}) {
      k = std::min(k, d);
      const int64_t rows = 5;
      std::vector<float> x(rows * d), y(rows * d, 7.0f);
      for (auto& v : x) v = std::round(normal(random) * 4);
      for (int64_t j = 0; j < d; ++j) x[j] = 0;
      x[d] = std::numeric_limits<float>::quiet_NaN();
      x[2 * d + d - 1] = -std::numeric_limits<float>::infinity();
      x[3 * d] = std::numeric_limits<float>::denorm_min();
      expect(acttail_topk_mask_f32(x.data(), y.data(), rows, d, k, 2) == ACTTAIL_OK, "status", d, k);
      for (int64_t r = 0; r < rows; ++r) {
        const std::vector<float> row(x.begin() + r * d, x.begin() + (r + 1) * d);
        const auto want = by_sorting(row, k);
        expect(std::memcmp(want.data(), y.data() + r * d, sizeof(float) * d) == 0, "fp32 row", d, k);
      }
      // bfloat16: the upper halves of the same numbers.
      std::vector<uint16_t> h(rows * d), g(rows * d, 7);
      for (int64_t i = 0; i < rows * d; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &x[i], 4);
        h[i] = static_cast<uint16_t>(bits >> 16);
      }
      expect(acttail_topk_mask_16(h.data(), g.data(), rows, d, k, 0x7F80, 2) == ACTTAIL_OK, "status",
             d, k);
      for (int64_t r = 0; r < rows; ++r) {
        std::vector<float> row(d);
        for (int64_t j = 0; j < d; ++j) {
          const uint32_t bits = static_cast<uint32_t>(h[r * d + j]) << 16;
          std::memcpy(&row[j], &bits, 4);
        }
        const auto want = by_sorting(row, k);
        bool same = true;
        for (int64_t j = 0; j < d; ++j) {
          uint32_t bits;
          std::memcpy(&bits, &want[j], 4);
          same = same && g[r * d + j] == static_cast<uint16_t>(bits >> 16);
        }
        expect(same, "bf16 row", d, k);
      }
      cases += 2;
    }
  }
  float one = 1, out = 0;
  expect(acttail_topk_mask_f32(&one, &out, 1, 1, 2, 1) == ACTTAIL_BAD_ARGUMENT, "k > d", 1, 2);
  expect(acttail_topk_mask_f32(nullptr, &out, 1, 1, 1, 1) == ACTTAIL_BAD_ARGUMENT, "null", 1, 1);
  std::printf("%s: %d shapes on %s, %d failures\n", __FILE__, cases, acttail_isa(), failures);
  return failures == 0 ? 0 : 1;
}
