// Picks the instruction set, once per process.
#include <cstdlib>
#include <cstring>

#include "kernels.hpp"

namespace acttail {

const Kernels& kernels_portable();
const Kernels& kernels_neon();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512vnni();

namespace {

#if defined(ACTTAIL_HAS_AVX2)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#if defined(ACTTAIL_HAS_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
#if defined(ACTTAIL_HAS_AVX512VNNI)
bool has_avx512vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
#endif
bool always() { return true; }

constexpr InstructionSet kSets[] = {
#if defined(ACTTAIL_HAS_AVX512VNNI)
    {"avx512vnni", has_avx512vnni, kernels_avx512vnni},
#endif
#if defined(ACTTAIL_HAS_AVX512)
    {"avx512", has_avx512, kernels_avx512},
#endif
#if defined(ACTTAIL_HAS_AVX2)
    {"avx2", has_avx2, kernels_avx2},
#endif
#if defined(ACTTAIL_HAS_NEON)
    {"neon", always, kernels_neon},
#endif
    {"portable", always, kernels_portable},
};

// Place of a name from best to worst, compiled here or not; 0 for names that nobody knows.
int rank(const char* name) {
  constexpr const char* names[] = {"avx512vnni", "avx512", "avx2", "neon", "portable"};
  for (int i = 0; name != nullptr && i < 5; ++i) {
    if (std::strcmp(name, names[i]) == 0) return i;
  }
  return 0;
}

// A forced name skips the better sets, never the check that the CPU has it.
const Kernels& choose() {
  const int forced = rank(std::getenv("ACTTAIL_ISA"));
  for (const InstructionSet& set : kSets) {
    if (rank(set.name) >= forced && set.supported()) return set.kernels();
  }
  return kernels_portable();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

InstructionSets instruction_sets() { return {kSets, kSets + sizeof kSets / sizeof kSets[0]}; }

}  // namespace acttail
