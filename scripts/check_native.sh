#!/usr/bin/env bash
# The C++ tests under AddressSanitizer and UBSan on every instruction set this machine has, and the
# engine's thread pool under ThreadSanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake="${VENV:-.venv}/bin/cmake"
[ -x "$cmake" ] || cmake=cmake
mkdir -p build
build() { # folder, sanitizers
  { "$cmake" -S . -B "build/$1" "-DACTTAIL_SANITIZE=$2" -DACTTAIL_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo &&
    "$cmake" --build "build/$1" --parallel 2; } >"build/$1.log" 2>&1 || { cat "build/$1.log"; exit 1; }
}
build sanitize address,undefined
for isa in portable avx2 avx512 avx512vnni; do
  for test in test_topk test_engine; do
    # OpenMP's runtime keeps its threads until exit; that is not a leak of ours.
    ACTTAIL_ISA=$isa ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 "build/sanitize/native/$test"
  done
done
build tsan thread
TSAN_OPTIONS=halt_on_error=1 build/tsan/native/test_engine
