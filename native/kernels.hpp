// What is needed of an instruction set: one table of functions, filled per translation unit.
#pragma once

#include <cstdint>

namespace acttail {

// Weight formats. A matrix is input-major: row i holds the weights that input i meets, one per output.
enum Format : int32_t { kF32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3 };

// Outputs are laid out in blocks of this many; every row is padded to whole blocks.
constexpr int64_t kBlock = 64;

struct Matrix {
  int32_t format;
  int32_t group;            // inputs that share a scale (int8, int4)
  int64_t d_in;             // rows
  int64_t columns;          // outputs, padded to a multiple of kBlock
  const void* data;         // [d_in][columns], columns * bits / 8 bytes a row
  const uint16_t* scale;    // [ceil(d_in / group)][columns] IEEE half, or null
  const uint16_t* minimum;  // the same shape, or null for symmetric levels
};

inline int64_t bits_of(int32_t format) {
  return format == kF32 ? 32 : format == kBf16 ? 16 : format == kInt8 ? 8 : 4;
}
inline int64_t row_bytes(const Matrix& m) { return m.columns * bits_of(m.format) / 8; }

// Rows of a matrix that a sparse vector meets.
struct Rows {
  const int32_t* index;  // ascending row numbers, or null for first, first + 1, ...
  const float* x;        // [count][batch] factors
  int64_t count;
  int64_t first;
};

struct KvHead;  // attention.hpp

struct Kernels {
  const char* name;
  // TopK mask of rows; scratch holds `columns` keys of the kernel's width.
  void (*mask_f32)(const float* x, float* y, int64_t rows, int64_t columns, int64_t k,
                   int32_t* scratch);
  void (*mask_16)(const uint16_t* x, uint16_t* y, int64_t rows, int64_t columns, int64_t k,
                  uint16_t infinity, int16_t* scratch);
  // y[b * stride + j] += sum_c x[c * batch + b] * W[index[c], j] for begin <= j < end, both multiples of
  // kBlock; 1 <= batch <= 8.
  void (*add_rows)(const Matrix& m, const Rows& rows, int64_t begin, int64_t end, float* y,
                   int64_t batch, int64_t stride);
  // y[j] = sum_i W[j, i] * x[i] for first <= j < last of an output-major matrix: d_in counts outputs,
  // columns inputs, and a scale group lies along a row ([outputs][columns / group]).
  void (*dot_rows)(const Matrix& m, const float* x, int64_t first, int64_t last, float* y);
  // Row `row` of an output-major matrix as floats [columns].
  void (*decode_dot_row)(const Matrix& m, int64_t row, float* out);
  // Row `row` of an input-major matrix as floats [columns].
  void (*decode_row)(const Matrix& m, int64_t row, float* out);
  // Keys of a vector that order like the magnitude of x (times scale, if given).
  void (*magnitude_keys)(const float* x, const float* scale, int64_t n, int32_t* keys);
  // The largest t with count(keys >= t) >= k; `at_least` receives that count.
  int32_t (*kth_largest)(const int32_t* keys, int64_t n, int64_t k, int64_t* at_least);
  // Appends (j, x[j]) for low <= keys[j] < high; returns how many. Room for n + 16 is needed.
  int64_t (*gather)(const int32_t* keys, const float* x, int64_t n, int32_t low, int64_t high,
                    int32_t* index, float* value);
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* y);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t n, float eps,
                     float* y);
  // y = act(gate) * up; kind: 0 silu, 1 tanh-gelu, 2 erf-gelu, 3 relu. up may be null.
  void (*activate)(const float* gate, const float* up, int64_t n, int32_t kind, float* y);
  // Rotates pairs (i, i + half) of one head; cos and sin are [half].
  void (*rope)(float* head, const float* cos, const float* sin, int64_t half);
  // Query heads [heads][kv.width] that share one cached head; out is the same shape, scores
  // [kMostHeads][kv.length]. See attention.inc.
  void (*attend)(const KvHead& kv, const float* queries, int64_t heads, float scale, float softcap,
                 float* scores, float* out);
  // Writes one key or value of `width` floats into cache storage.
  void (*encode_kv)(int32_t format, const float* x, int64_t width, void* data, float* scale);
  void (*decode_kv)(int32_t format, const void* data, float scale, int64_t width, float* x);
  // y += x, over n floats.
  void (*accumulate)(float* y, const float* x, int64_t n);
  // x = cap * tanh(x / cap)
  void (*softcap)(float* x, int64_t n, float cap);
};

// The table in use: the best one this CPU has, or what ACTTAIL_ISA asks for.
const Kernels& kernels();

const Kernels& kernels_portable();
const Kernels& kernels_neon();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512vnni();

}  // namespace acttail
