#!/usr/bin/env bash
# The C++ tests under AddressSanitizer and UBSan on every instruction set this machine has, and the
# engine's thread pool under ThreadSanitizer. Where a cross compiler is there, the AArch64 kernels too, and run
# where qemu-user is. No plain build may warn, and no instruction set's kernels may hold a function that the linker
# could put in the place of another set's.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake="${VENV:-.venv}/bin/cmake"
[ -x "$cmake" ] || cmake=cmake
mkdir -p build
build() { # folder, options of cmake
  folder="build/$1"
  { "$cmake" -S . -B "$folder" -DACTTAIL_TESTS=ON "${@:2}" && "$cmake" --build "$folder" --clean-first --parallel 2; } \
    >"$folder.log" 2>&1 || { cat "$folder.log"; exit 1; }
}
# Not of sanitized builds, whose extra code sets off false alarms.
clean() { # nm
  if grep -A 5 "warning:" "$folder.log"; then exit 1; fi
  if "$1" -C --defined-only "$folder"/native/CMakeFiles/acttail_*.dir/kernels_isa.cpp.o | grep " [WVu] "; then exit 1; fi
}
sanitized() { # folder, sanitizers
  build "$1" "-DACTTAIL_SANITIZE=$2" -DCMAKE_BUILD_TYPE=RelWithDebInfo
}
build plain -DCMAKE_BUILD_TYPE=Release
clean nm
sanitized sanitize address,undefined
for isa in portable avx2 avx512 avx512vnni; do
  for test in test_topk test_engine test_faults; do
    # OpenMP's runtime keeps its threads until exit; that is not a leak of ours.
    ACTTAIL_ISA=$isa ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 "build/sanitize/native/$test"
  done
done
UBSAN_OPTIONS=halt_on_error=1 build/sanitize/native/test_kernels # all sets in one run
if command -v aarch64-linux-gnu-g++ >/dev/null; then
  build aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_BUILD_TYPE=Release
  clean aarch64-linux-gnu-nm
  if command -v qemu-aarch64 >/dev/null; then
    run="qemu-aarch64 -L /usr/aarch64-linux-gnu"
    for isa in portable neon; do
      for test in test_topk test_engine test_faults; do
        ACTTAIL_ISA=$isa $run "build/aarch64/native/$test"
      done
    done
    $run build/aarch64/native/test_kernels
  fi
else
  echo "no cross compiler for AArch64: its kernels are not compiled"
fi
sanitized tsan thread
TSAN_OPTIONS=halt_on_error=1 build/tsan/native/test_engine
