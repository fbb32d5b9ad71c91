// All kernels, compiled for the avx512vnni flags of this translation unit.
#include "kernels.hpp"

#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "attention.hpp"
#include "simd_avx512.hpp"

namespace {
using namespace acttail;
#include "topk_rows.inc"
#include "vector_ops.inc"
#include "formats.inc"
#include "ahead.inc"
#include "vnni.inc"
#include "gemv.inc"
#include "attention.inc"
}  // namespace

namespace acttail {

const Kernels& kernels_avx512vnni() {
  static constexpr Kernels table{
      "avx512vnni", mask_f32, mask_16, add_rows, dot_rows, decode_dot_row, decode_row,
      magnitude_keys, kth_largest_key, gather, rms_norm, layer_norm, activate, rope, attend,
      encode_kv, decode_kv, accumulate, softcap,
  };
  return table;
}

}  // namespace acttail
