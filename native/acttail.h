// The plain C ABI of acttail's native library. No C++ type crosses it, so one build serves every
// Python and every torch. Status codes: 0 is success, anything else names the refusal. No function throws
// or ends the process when memory runs out; what it was to write is then undefined, all else as it was.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define ACTTAIL_API __declspec(dllexport)
#else
#define ACTTAIL_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised by one whenever a signature below changes.
#define ACTTAIL_ABI 16

enum acttail_status {
  ACTTAIL_OK = 0,
  ACTTAIL_BAD_ARGUMENT = 1,
  ACTTAIL_OUT_OF_MEMORY = 2,
  ACTTAIL_FAILED = 3,  // the system refused something else, such as a thread
};

ACTTAIL_API int acttail_abi(void);

// Where a struct of this ABI keeps a field, so that a mirror in another language can be compared before it is
// used: names without their "acttail_". With a null field, offset is 0 and size that of the whole struct.
// ACTTAIL_BAD_ARGUMENT for a name that does not exist.
ACTTAIL_API int acttail_layout(const char* structure, const char* field, int64_t* offset, int64_t* size);

// Name of the instruction set in use: "portable", "neon", "avx2", "avx512" or "avx512vnni". The environment variable
// ACTTAIL_ISA forces one; a name that is unknown or not supported here falls back to the best one
// below it, and acttail_isa() tells the truth.
ACTTAIL_API const char* acttail_isa(void);

// Exact TopK mask over rows. x and y are [rows, columns], contiguous and non-overlapping. Each row
// of y keeps the k entries of largest magnitude of the same row of x and is zero elsewhere. Ties go
// to the lower column; NaN ranks above infinity, infinity above every number.
// 1 <= k <= columns; threads >= 1.
ACTTAIL_API int acttail_topk_mask_f32(const float* x, float* y, int64_t rows, int64_t columns,
                                      int64_t k, int threads);

// The same for 16-bit floats given as their bit patterns. infinity is the bit pattern of +inf:
// 0x7F80 for bfloat16, 0x7C00 for IEEE half.
ACTTAIL_API int acttail_topk_mask_16(const uint16_t* x, uint16_t* y, int64_t rows, int64_t columns,
                                     int64_t k, uint16_t infinity, int threads);

// Adds to sums[i, g], for each of `vectors` matrices v[i], the sum over rows of half the square of
// the partial sum of v[i][r, j] * x[r, j] over the dropped[g] entries of row r that TopK would drop
// first. x and every v[i] are [rows, columns]; dropped ascends; sums is [vectors, points].
ACTTAIL_API int acttail_curves_f32(const float* x, const float* const* v, int64_t vectors,
                                   int64_t rows, int64_t columns, const int64_t* dropped,
                                   int64_t points, double* sums, int threads);

// Seconds that `threads` threads take to read `words` 64-bit words once; negative on bad arguments or
// without memory or threads.
ACTTAIL_API double acttail_read_seconds(const uint64_t* data, int64_t words, int threads);

#ifdef __cplusplus
}
#endif
