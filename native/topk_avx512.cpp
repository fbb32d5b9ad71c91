// TopK row kernels, compiled for the avx512 flags of this translation unit.
#include "topk.hpp"

namespace {
#include "topk_rows.inc"
}  // namespace

namespace acttail {

const TopkKernels& topk_avx512() {
  static constexpr TopkKernels kernels{mask_f32, mask_16};
  return kernels;
}

}  // namespace acttail
