// One output's weights of an input-major matrix: the embedding of a token where the output head's matrix is the only one.
#pragma once

#include "formats.hpp"

namespace acttail {

// out[i] = the weight that input i meets on its way to output `column`, for every row i: the number that decode_row has
// there, whatever the instruction set.
void gather_column(const Matrix& m, int64_t column, float* out);

}  // namespace acttail
