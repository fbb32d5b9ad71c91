// Not compiled for each instruction set: a line of memory is waited for for every weight, and what is done with it is hidden
// behind that.
#include "gather.hpp"

#include <algorithm>
#include <cstring>

#include "half.hpp"

namespace acttail {

namespace {

// Rows asked for ahead of the one that is taken.
constexpr int64_t kRowsAhead = 32;

inline void ask(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

// One column of an input-major matrix, as engine.h lays it out.
class Column {
 public:
  Column(const Matrix& m, int64_t column) : m_(m), traits_(kFormatTraits[m.format]), column_(column) {
    const int64_t block = column / traits_.block, within = column % traits_.block;
    const int64_t bytes = int64_t{traits_.block} * traits_.bits / 8;
    zero_ = m.minimum != nullptr ? 0 : m.format == kInt4 ? 8 : traits_.zero;
    if (of_file(m.format)) {
      const int64_t upper = within / 64, lane = within % 16 / 4, byte = within % 64 / 16 * 4 + within % 4;
      at_ = block * bytes + 16 * lane + byte;
      shift_ = static_cast<int>(4 * upper);
      const int64_t plane_bytes = int64_t{traits_.block} * traits_.plane / 8;
      in_plane_ = block * plane_bytes + byte + (traits_.plane == 2 ? lane % 2 * 16 : 0);
      plane_shift_ = static_cast<int>(traits_.plane == 2 ? lane / 2 * 4 + 2 * upper : 2 * lane + upper);
    } else if (m.format == kInt4) {
      at_ = block * bytes + within % 32;
      shift_ = static_cast<int>(within / 32 * 4);
    } else {
      at_ = column * traits_.bits / 8;
    }
  }

  // Asks for what operator() of a row reads.
  void ahead(int64_t row) const {
    ask(data(row));
    if (traits_.plane) ask(plane(row));
    if (traits_.scaled) ask(m_.scale + shared(row));
    if (m_.minimum != nullptr) ask(m_.minimum + shared(row));
    if (traits_.sub) ask(sub_scale(row));
    if (m_.sub_minimum != nullptr) ask(sub_minimum(row));
  }

  // Each product is exact, so that at most the last addition rounds: as everywhere, fused or not.
  float operator()(int64_t row) const {
    const uint8_t* const p = data(row);
    if (!traits_.scaled) return plain(p);
    float scale = half_to_float(m_.scale[shared(row)]);
    // Scales within a group have a sign where there are no minima.
    if (traits_.sub) scale *= static_cast<float>(traits_.minimum ? *sub_scale(row) : static_cast<int8_t>(*sub_scale(row)));
    const float value = scale * static_cast<float>(level(p, row) - zero_);
    if (m_.minimum == nullptr) return value;
    const float minimum = half_to_float(m_.minimum[shared(row)]);
    return traits_.sub ? value - minimum * static_cast<float>(*sub_minimum(row)) : value + minimum;
  }

 private:
  const uint8_t* data(int64_t row) const { return static_cast<const uint8_t*>(m_.data) + row * row_bytes(m_) + at_; }
  const uint8_t* plane(int64_t row) const {
    return static_cast<const uint8_t*>(m_.plane) + row * (m_.columns * traits_.plane / 8) + in_plane_;
  }
  int64_t shared(int64_t row) const { return row / m_.group * m_.columns + column_; }
  const uint8_t* sub_scale(int64_t row) const {
    return static_cast<const uint8_t*>(m_.sub_scale) + row / traits_.sub * m_.columns + column_;
  }
  const uint8_t* sub_minimum(int64_t row) const {
    return static_cast<const uint8_t*>(m_.sub_minimum) + (row / 128 * m_.columns + column_) * 4 + row % 128 / 32;
  }

  float plain(const uint8_t* p) const {
    uint32_t bits = 0;
    if (m_.format == kF32) {
      std::memcpy(&bits, p, 4);
    } else {
      uint16_t upper;
      std::memcpy(&upper, p, 2);
      bits = uint32_t{upper} << 16;
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  int32_t level(const uint8_t* p, int64_t row) const {
    if (traits_.bits == 8) return static_cast<int8_t>(*p);
    const int32_t low = *p >> shift_ & 15;
    if (!traits_.plane) return low;
    return low | (*plane(row) >> plane_shift_ & ((1 << traits_.plane) - 1)) << 4;
  }

  const Matrix& m_;
  const FormatTraits& traits_;
  int64_t column_;
  int64_t at_ = 0, in_plane_ = 0;  // bytes within a row
  int shift_ = 0, plane_shift_ = 0;
  int32_t zero_ = 0;
};

}  // namespace

void gather_column(const Matrix& m, int64_t column, float* out) {
  const Column entry(m, column);
  for (int64_t i = 0; i < std::min(kRowsAhead, m.rows); ++i) entry.ahead(i);
  for (int64_t i = 0; i < m.rows; ++i) {
    if (i + kRowsAhead < m.rows) entry.ahead(i + kRowsAhead);
    out[i] = entry(i);
  }
}

}  // namespace acttail

extern "C" int acttail_gather_columns(const acttail_matrix* m, const int64_t* columns, int64_t count, float* out,
                                      int threads) {
  if (m == nullptr || !acttail::usable(*m) || (columns == nullptr && count > 0) || out == nullptr || count < 0 ||
      threads < 1) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (columns[i] < 0 || columns[i] >= m->columns) return ACTTAIL_BAD_ARGUMENT;
  }
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(count, threads));
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
      acttail::gather_column(*m, columns[i], out + i * m->rows);
    }
  }
  return ACTTAIL_OK;
}
