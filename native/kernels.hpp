// What is needed of an instruction set: one table of functions (kernels.def), filled once for each by
// kernels_isa.cpp.
#pragma once

#include <cstdint>

#include "attention.hpp"
#include "fit.hpp"
#include "formats.hpp"

namespace acttail {

// Rows of a matrix that a sparse vector meets.
struct Rows {
  const int32_t* index;  // ascending row numbers, or null for first, first + 1, ...
  const float* x;        // [count] factors
  int64_t count;
  int64_t first;
};

// Vectors that add_rows_together takes at most, and the numbers it works with: 256 KB of sums beside as much of y,
// so that the second-level cache holds both. More columns are taken in equal strips.
constexpr int64_t kMostTogether = 8;
constexpr int64_t kTogetherScratch = int64_t{1} << 16;

struct Kernels {
  const char* name;  // of the instruction set
#define KERNEL(result, name, arguments) result(*name) arguments;
#include "kernels.def"
#undef KERNEL
};

// Bytes that dot_rows works with: x in integers of at most three bytes each, from a cache line on.
static constexpr int64_t dot_scratch(int64_t columns) { return 3 * columns + 64; }

// The table in use: the best one this CPU has, or what ACTTAIL_ISA asks for.
const Kernels& kernels();

// An instruction set that this library was compiled for.
struct InstructionSet {
  const char* name;
  bool (*supported)();  // by this CPU
  const Kernels& (*kernels)();
};

// All of them, best first; the portable one, which every CPU supports, ends the list.
struct InstructionSets {
  const InstructionSet *first, *last;
  const InstructionSet* begin() const { return first; }
  const InstructionSet* end() const { return last; }
};
InstructionSets instruction_sets();

}  // namespace acttail
