// All kernels of one instruction set. CMakeLists.txt compiles this file once for each, with the flags of the
// set, its name as ACTTAIL_ISA and the file of its vector type as ACTTAIL_SIMD.
//
// Everything here has internal linkage and no template of the standard library is instantiated: the linker
// keeps one copy of an inline function for the whole library, and that copy may not be one that only
// some CPUs can run.
#include "kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "half.hpp"
#include ACTTAIL_SIMD

// Of AVX-512 without VNNI there is no machine to measure on; it keeps to floats.
#if defined(__AVX2__) && !defined(__AVX512F__)
#define ACTTAIL_PAIRS
#endif

// What must be inlined before anything is unrolled, for the arrays in it to stay in registers. Sanitized builds, where it
// would only take minutes more, leave it to the compiler.
#if defined(__GNUC__) && !defined(ACTTAIL_SANITIZED)
#define ACTTAIL_INLINE __attribute__((always_inline)) inline
#else
#define ACTTAIL_INLINE inline
#endif

#define ACTTAIL_JOIN_(a, b) a##b
#define ACTTAIL_JOIN(a, b) ACTTAIL_JOIN_(a, b)
#define ACTTAIL_TEXT_(a) #a
#define ACTTAIL_TEXT(a) ACTTAIL_TEXT_(a)

namespace acttail {
// Of fit_isa.cpp.
void ACTTAIL_JOIN(fit_columns_, ACTTAIL_ISA)(const float* x, int64_t inputs, FitBlock& out);
}  // namespace acttail

namespace {
using namespace acttail;
#include "topk_rows.inc"
#include "vector_ops.inc"
#include "formats.inc"
#include "ahead.inc"
#include "passes.inc"
#if defined(__AVX512VNNI__)
#include "quads.inc"
#include "vnni.inc"
#endif
#include "entries.inc"
#include "blocks.inc"
#if defined(__AVX512VNNI__)
#include "bytes.inc"
#endif
#if defined(ACTTAIL_PAIRS)
#include "quads.inc"
#include "pairs.inc"
#include "pairs_dot.inc"
#endif
#include "gemv.inc"
#include "dot_together.inc"
#include "together.inc"
#if defined(__AVX512VNNI__)
#include "vnni_together.inc"
#include "bytes_together.inc"
#endif
#if defined(ACTTAIL_PAIRS)
#include "pairs_together.inc"
#endif
#include "blocks_together.inc"
#include "add_together.inc"
#include "attention.inc"

constexpr auto fit_block = ACTTAIL_JOIN(fit_columns_, ACTTAIL_ISA);

constexpr Kernels filled() {
  Kernels table{};
  table.name = ACTTAIL_TEXT(ACTTAIL_ISA);
#define KERNEL(result, name, arguments) table.name = name;
#include "kernels.def"
#undef KERNEL
  return table;
}
}  // namespace

namespace acttail {

const Kernels& ACTTAIL_JOIN(kernels_, ACTTAIL_ISA)() {
  static constexpr Kernels table = filled();
  return table;
}

}  // namespace acttail
