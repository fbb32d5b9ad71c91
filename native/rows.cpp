// Rows of one matrix, without an engine: for prompts, conversion checks, tuning and tests.
#include <algorithm>
#include <cstring>
#include <vector>

#include "guard.hpp"
#include "kernels.hpp"

namespace {

// One decoded row's columns begin .. begin + width as bfloat16.
void round_row(const acttail::Kernels& kernels, const float* row, int64_t width, uint16_t* to) {
  const int64_t whole = width / 16 * 16;
  kernels.encode_kv(acttail::kKvBf16, row, whole, to, nullptr);
  if (whole == width) return;
  float tail[16] = {};
  uint16_t rounded[16];
  std::memcpy(tail, row + whole, sizeof(float) * static_cast<size_t>(width - whole));
  kernels.encode_kv(acttail::kKvBf16, tail, 16, rounded, nullptr);
  std::memcpy(to + whole, rounded, sizeof(uint16_t) * static_cast<size_t>(width - whole));
}

int decode_rows(const acttail_matrix& m, int64_t first, int64_t last, int64_t begin, int64_t end,
                bool as_float, void* out, int threads) {
  const acttail::Kernels& kernels = acttail::kernels();
  const int64_t width = end - begin, count = last - first;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(count, threads));
  // Whole blocks of columns, of which begin .. end are wanted.
  const int64_t block = acttail::kFormatTraits[m.format].block, from = begin / block * block;
  const int64_t to = (end + block - 1) / block * block;
  std::vector<float> scratch(static_cast<size_t>(parts * (to - from)));
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    float* row = scratch.data() + part * (to - from);
    for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
      kernels.decode_row(m, first + i, from, to, row);
      if (as_float) {
        std::memcpy(static_cast<float*>(out) + i * width, row + begin - from,
                    sizeof(float) * static_cast<size_t>(width));
      } else {
        round_row(kernels, row + begin - from, width, static_cast<uint16_t*>(out) + i * width);
      }
    }
  }
  return ACTTAIL_OK;
}

// Whether `count` rows of a matrix and columns begin .. end can be added up for `batch` vectors.
bool addable(const acttail_matrix* m, const float* x, int64_t count, int64_t begin, int64_t end, const float* y,
             int64_t batch) {
  if (m == nullptr || !acttail::usable(*m) || (x == nullptr && count > 0) || y == nullptr) return false;
  const int64_t block = acttail::kFormatTraits[m->format].block;
  return count >= 0 && count <= m->rows && begin >= 0 && end >= begin && end <= m->columns && begin % block == 0 &&
         end % block == 0 && batch >= 1 && batch <= acttail::kMostTogether;
}

}  // namespace

extern "C" {

int acttail_decode_rows(const acttail_matrix* m, int64_t first, int64_t last, int64_t begin,
                        int64_t end, int as_float, void* out, int threads) {
  if (m == nullptr || !acttail::usable(*m) || out == nullptr || first < 0 || last < first ||
      last > m->rows || begin < 0 || end < begin || end > m->columns || threads < 1) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  return acttail::guarded(
      [&] { return decode_rows(*m, first, last, begin, end, as_float != 0, out, threads); });
}

int acttail_add_rows(const acttail_matrix* m, const int32_t* index, const float* x, int64_t count,
                     int64_t begin, int64_t end, float* y, int64_t batch, int64_t stride) {
  if (!addable(m, x, count, begin, end, y, batch)) return ACTTAIL_BAD_ARGUMENT;
  if (batch == 1) {
    acttail::kernels().add_rows(*m, {index, x, count, 0}, begin, end, y);
    return ACTTAIL_OK;
  }
  return acttail::guarded([&] {
    std::vector<float> own(static_cast<size_t>(count * batch));
    std::vector<int32_t> scratch(static_cast<size_t>(acttail::kTogetherScratch));
    acttail::Rows rows[acttail::kMostTogether];
    for (int64_t b = 0; b < batch; ++b) {
      float* const to = own.data() + b * count;
      for (int64_t c = 0; c < count; ++c) to[c] = x[c * batch + b];
      rows[b] = {index, to, count, 0};
    }
    acttail::kernels().add_rows_together(*m, rows, batch, begin, end, y, stride, scratch.data());
    return ACTTAIL_OK;
  });
}

int acttail_add_lists(const acttail_matrix* m, const int32_t* index, const float* x, int64_t count, int64_t begin,
                      int64_t end, float* y, int64_t batch, int64_t stride) {
  if (!addable(m, x, count, begin, end, y, batch) || (index == nullptr && count > 0)) return ACTTAIL_BAD_ARGUMENT;
  return acttail::guarded([&] {
    // Kept: a call that is timed should not fill 256 KB with zeros first.
    static thread_local std::vector<int32_t> scratch(static_cast<size_t>(acttail::kTogetherScratch));
    acttail::Rows rows[acttail::kMostTogether];
    for (int64_t b = 0; b < batch; ++b) rows[b] = {index + b * count, x + b * count, count, 0};
    acttail::kernels().add_rows_together(*m, rows, batch, begin, end, y, stride, scratch.data());
    return ACTTAIL_OK;
  });
}

int acttail_dot_rows(const acttail_matrix* m, const float* x, float* y) {
  if (m == nullptr || !acttail::usable_output_major(*m) || x == nullptr || y == nullptr) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  return acttail::guarded([&] {
    std::vector<uint8_t> scratch(static_cast<size_t>(acttail::dot_scratch(m->columns)));
    acttail::kernels().dot_rows(*m, x, 0, m->rows, y, scratch.data());
    return ACTTAIL_OK;
  });
}

}  // extern "C"
