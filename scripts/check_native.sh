#!/usr/bin/env bash
# The C++ tests under AddressSanitizer and UBSan on every instruction set this machine has, and the
# engine's thread pool under ThreadSanitizer. Where a cross compiler is there, the AArch64 kernels too, and run
# where qemu-user is.
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
if command -v aarch64-linux-gnu-g++ >/dev/null; then
  { "$cmake" -S . -B build/aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
      -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DACTTAIL_TESTS=ON -DCMAKE_BUILD_TYPE=Release &&
    "$cmake" --build build/aarch64 --parallel 2; } >build/aarch64.log 2>&1 || { cat build/aarch64.log; exit 1; }
  if command -v qemu-aarch64 >/dev/null; then
    for isa in portable neon; do
      for test in test_topk test_engine; do
        ACTTAIL_ISA=$isa qemu-aarch64 -L /usr/aarch64-linux-gnu "build/aarch64/native/$test"
      done
    done
  fi
else
  echo "no cross compiler for AArch64: its kernels are not compiled"
fi
build tsan thread
TSAN_OPTIONS=halt_on_error=1 build/tsan/native/test_engine
