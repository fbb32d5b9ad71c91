#!/usr/bin/env bash
# Build sdist and wheel, install the wheel into an empty environment beside this one's dependencies,
# and run it from another folder; then the same without a compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/${VENV:-.venv}/bin/python"
root="$PWD"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
ls "$work/dist"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')

install_and_run() { # wheel, name, expected backend
  "$python" -m venv "$work/$2"
  "$work/$2/bin/python" -m pip install -q --no-deps --no-index "$1"
  # Dependencies are borrowed, after the new environment's own folder, so that nothing is fetched twice.
  borrowed=$("$work/$2/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  echo "import sys; sys.path.append('$site')" >"$borrowed/borrow.pth"
  (cd "$work" && "$work/$2/bin/python" -m acttail doctor --json >"$work/$2.json")
  "$python" - "$work/$2.json" "$3" "$work/$2" <<'PY'
import json, sys
report = json.load(open(sys.argv[1]))
assert sys.argv[2] in report["backend"], report
assert report["executable"].startswith(sys.argv[3]), report
if "native" in report["backend"]:
    assert report["native_library"].startswith(sys.argv[3]), report
print("wheel runs:", report["backend"])
PY
  mkdir "$work/$2-first-hour"
  (cd "$work" && ACTTAIL_CACHE="$work/$2-cache" "$work/$2/bin/python" "$root/scripts/wheel_smoke.py" "$work/$2-first-hour")
}

install_and_run "$work"/dist/*.whl with_native native

# Without a compiler the package still builds, says so, and runs on the reference backend.
CXX=/nonexistent/c++ "$python" -m build --wheel --outdir "$work/plain" . >"$work/plain.log" 2>&1 ||
  { cat "$work/plain.log"; exit 1; }
grep -q "no C++ compiler was found" "$work/plain.log" || { echo "no clear message about the compiler"; cat "$work/plain.log"; exit 1; }
install_and_run "$work"/plain/*.whl without_native reference
