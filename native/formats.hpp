// Weight and KV formats, a row each. Code per format is in formats.inc, blocks.inc and attention.inc; whatever
// else depends on a format reads it here.
#pragma once

#include <cstdint>

#include "engine.h"

namespace acttail {

using Matrix = ::acttail_matrix;

// Columns come in blocks of this many; every row of a matrix is padded to whole blocks.
constexpr int64_t kBlock = 64;

// The numbers of acttail_matrix.format. Those from kQ4K on are a GGUF file's own.
enum Format : int32_t { kF32, kBf16, kInt8, kInt4, kQ4K, kQ5K, kQ6K, kQ50, kQ51, kFormats };

struct FormatTraits {
  int bits;        // of one weight in `data`
  bool scaled;     // a scale for every `group` entries
  bool minimum;    // may have a minimum beside each scale
  int block = 64;  // columns come in blocks of this many
  int plane = 0;   // more bits of one weight, in `plane`
  int zero = 0;    // the level that stands for zero where there is no minimum
  int group = 0;   // inputs that share a scale, where the format fixes it
  int sub = 0;     // inputs that share a scale within such a group; 0: none do
  int reach = 0;   // largest |level * scale within a group|
  // Vectors from which on lists that differ are read once for all of them, where nobody has measured it (`acttail tune`).
  // Two cores of Zen 4, shapes of a 1.5B model: eight int8 vectors of density 0.5 then take 0.87 to 0.98 of the time, four
  // 0.85 to 1.02, and blocks of files 1.2 to 1.5 times as long, for the second vector's rows come from the caches.
  int together = ACTTAIL_NEVER;
};

constexpr FormatTraits kFormatTraits[kFormats] = {
    {32, false, false, 64, 0, 0, 0, 0, 0, 2},         // fp32
    {16, false, false, 64, 0, 0, 0, 0, 0, 2},         // bf16
    {8, true, false, 64, 0, 0, 0, 0, 0, 4},           // int8
    {4, true, true, 64, 0, 0, 0, 0, 0, 5},            // int4: 0 to 15 with a minimum, -8 to 7 without
    {4, true, true, 128, 0, 0, 256, 32, 15 * 127},    // Q4_K, and ours (fit.hpp)
    {4, true, true, 128, 1, 0, 256, 32, 31 * 63},     // Q5_K
    {4, true, false, 128, 2, 32, 256, 16, 32 * 128},  // Q6_K
    {4, true, false, 128, 1, 16, 32, 0, 0},           // Q5_0
    {4, true, true, 128, 1, 0, 32, 0, 0},             // Q5_1
};

// Whether the kernels of blocks.inc run a format; no output-major matrix has one.
static constexpr bool of_file(int32_t format) { return format >= kQ4K; }

// The numbers of acttail_model.kv_format.
enum KvFormat : int32_t { kKvF32, kKvBf16, kKvInt8, kKvFormats };

struct KvTraits {
  int bytes;    // of one element
  bool scaled;  // a scale per position and head, for keys and for values
};

constexpr KvTraits kKvTraits[kKvFormats] = {
    {4, false},  // fp32
    {2, false},  // bf16
    {1, true},   // int8
};

// Internal linkage: this header is compiled for every instruction set, and the linker must not keep the
// AVX-512 copy of a function for all of them.
static constexpr int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// Rows, columns, features: none has more, and no product of two of them and a width in bytes leaves int64_t.
constexpr int64_t kMost = int64_t{1} << 30;

// Whether a matrix is one that the kernels can read.
static inline bool usable(const Matrix& m) {
  if (m.format < 0 || m.format >= kFormats || m.rows < 1 || m.rows > kMost || m.columns < 1 ||
      m.columns > kMost || m.data == nullptr) {
    return false;
  }
  const FormatTraits& traits = kFormatTraits[m.format];
  if (m.columns % traits.block) return false;
  if (traits.scaled && (m.group < 1 || m.scale == nullptr)) return false;
  if (of_file(m.format)) {
    const bool minimum = m.minimum != nullptr, sub_minimum = m.sub_minimum != nullptr;
    // What is fitted to Q4_K may end in a short super-block; blocks of files are whole.
    const bool whole = m.rows % traits.group == 0 || m.format == kQ4K;
    return m.group == traits.group && whole && minimum == traits.minimum &&
           (m.plane != nullptr) == (traits.plane > 0) && (m.sub_scale != nullptr) == (traits.sub > 0) &&
           sub_minimum == (traits.minimum && traits.sub > 0);
  }
  return m.minimum == nullptr || traits.minimum;
}

// Whether it is one that dot_rows and decode_dot_row can read: a scale is a row's, or that of whole steps.
static inline bool usable_output_major(const Matrix& m) {
  return usable(m) && !of_file(m.format) &&
         (!kFormatTraits[m.format].scaled || m.group >= m.columns || m.group % 32 == 0);
}

// An array of a matrix that is being made.
template <typename T>
static inline T* writable(const void* p) {
  return static_cast<T*>(const_cast<void*>(p));
}

static inline int64_t row_bytes(const Matrix& m) { return m.columns * kFormatTraits[m.format].bits / 8; }

}  // namespace acttail
