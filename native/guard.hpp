// The border of the C ABI: no exception leaves a C function.
#pragma once

#include <new>

#include "acttail.h"

namespace acttail {

// The status that f returns, or what stands for the exception that ended it. Code that other threads run
// allocates nothing, so that there is nothing to catch in them.
template <typename Function>
int guarded(Function f) noexcept {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return ACTTAIL_OUT_OF_MEMORY;
  } catch (...) {
    return ACTTAIL_FAILED;
  }
}

}  // namespace acttail
