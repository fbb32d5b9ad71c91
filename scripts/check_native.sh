#!/usr/bin/env bash
# The C++ tests under AddressSanitizer and UBSan, on every instruction set this machine has.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake="${VENV:-.venv}/bin/cmake"
[ -x "$cmake" ] || cmake=cmake
"$cmake" -S . -B build/sanitize -DACTTAIL_SANITIZE=ON -DACTTAIL_TESTS=ON -DCMAKE_BUILD_TYPE=Debug >build/sanitize.log 2>&1 ||
  { mkdir -p build; "$cmake" -S . -B build/sanitize -DACTTAIL_SANITIZE=ON -DACTTAIL_TESTS=ON -DCMAKE_BUILD_TYPE=Debug; }
"$cmake" --build build/sanitize --parallel 2 >>build/sanitize.log 2>&1 || { cat build/sanitize.log; exit 1; }
for isa in portable avx2 avx512; do
  # OpenMP's runtime keeps its threads until exit; that is not a leak of ours.
  ACTTAIL_ISA=$isa ASAN_OPTIONS=detect_leaks=0 build/sanitize/native/test_topk
done
