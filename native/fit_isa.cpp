// The fit of one instruction set. CMakeLists.txt compiles this file as it does kernels_isa.cpp, but without
// contraction; the same holds of it.
#include <cmath>
#include <cstdint>

#include "fit.hpp"
#include "half.hpp"
#include ACTTAIL_SIMD

#define ACTTAIL_JOIN_(a, b) a##b
#define ACTTAIL_JOIN(a, b) ACTTAIL_JOIN_(a, b)

namespace {
using namespace acttail;
#include "fit.inc"
}  // namespace

namespace acttail {

void ACTTAIL_JOIN(fit_columns_, ACTTAIL_ISA)(const float* x, int64_t inputs, FitBlock& out) {
  fit_columns(x, inputs, out);
}

}  // namespace acttail
