// The table of row kernels that each instruction set fills and dispatch.cpp picks from.
#pragma once

#include <cstdint>

namespace acttail {

struct TopkKernels {
  // scratch holds `columns` keys of the kernel's width.
  void (*mask_f32)(const float* x, float* y, int64_t rows, int64_t columns, int64_t k,
                   int32_t* scratch);
  void (*mask_16)(const uint16_t* x, uint16_t* y, int64_t rows, int64_t columns, int64_t k,
                  uint16_t infinity, int16_t* scratch);
};

const TopkKernels& topk_portable();
const TopkKernels& topk_avx2();
const TopkKernels& topk_avx512();

}  // namespace acttail
