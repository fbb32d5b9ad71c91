// All kernels, for the baseline of AArch64.
#include "kernels.hpp"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention.hpp"
#include "simd_neon.hpp"

namespace {
using namespace acttail;
#include "topk_rows.inc"
#include "vector_ops.inc"
#include "formats.inc"
#include "ahead.inc"
#include "gemv.inc"
#include "attention.inc"
}  // namespace

namespace acttail {

const Kernels& kernels_neon() {
  static constexpr Kernels table{
      "neon", mask_f32, mask_16, add_rows, dot_rows, decode_dot_row, decode_row,
      magnitude_keys, kth_largest_key, gather, rms_norm, layer_norm, activate, rope, attend,
      encode_kv, decode_kv, accumulate, softcap,
  };
  return table;
}

}  // namespace acttail
