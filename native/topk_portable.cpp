// TopK row kernels, compiled for the portable flags of this translation unit.
#include "topk.hpp"

namespace {
#include "topk_rows.inc"
}  // namespace

namespace acttail {

const TopkKernels& topk_portable() {
  static constexpr TopkKernels kernels{mask_f32, mask_16};
  return kernels;
}

}  // namespace acttail
