// Whether a model's description is one that the engine can run.
#pragma once

#include "engine.h"

namespace acttail {

// Sizes, formats, offsets and rules fit together, so that no call reads or writes outside what is described.
bool runnable(const acttail_model& model);

}  // namespace acttail
