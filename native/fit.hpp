// Fitting floats to four bits under scales and minima of super-blocks: Q4_K's form, our own numbers.
#pragma once

#include <cstdint>

namespace acttail {

constexpr int64_t kFitColumns = 128;  // fitted together: a block of columns
constexpr int64_t kFitInputs = 256;   // of a super-block
constexpr int64_t kFitGroup = 32;     // inputs that share a scale within it
// Scales and minima within a super-block. Bytes hold them, so that seven bits cost what Q4_K's six do: the squared
// error is 1.3 to 1.9 % smaller for it (normal and t-distributed weights). An eighth bit would give another 0.2 %, and
// leave too little of 32 bits for x.
constexpr int kFitSteps = 127;

// A super-block of a block of columns: weight = scale * sub_scale * level - minimum * sub_minimum.
struct FitBlock {
  uint8_t level[kFitInputs][kFitColumns];
  uint8_t sub_scale[kFitInputs / kFitGroup][kFitColumns];
  uint8_t sub_minimum[kFitInputs / kFitGroup][kFitColumns];
  uint16_t scale[kFitColumns], minimum[kFitColumns];
};

}  // namespace acttail
