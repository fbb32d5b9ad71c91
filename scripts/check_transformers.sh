#!/usr/bin/env bash
# The oldest and the newest transformers that pyproject.toml allows, each beside the torch that is installed: what
# touches transformers must pass on both. Versions may be given instead. Needs the network (or a wheel cache).
#
#   VENV=.venv scripts/check_transformers.sh [VERSION …]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${VENV:-.venv}/bin/python
# The first is the pin's lower bound; the newest is whatever pip finds below the upper one.
pin=$(sed -n 's/^ *"transformers\(.*\)",.*/\1/p' pyproject.toml)
oldest=$(sed 's/>=\([0-9.]*\),.*/\1/' <<<"$pin")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for asked in "${@:-$oldest newest}"; do
  for version in $asked; do
    case $version in
      newest) wanted="transformers$pin" ;;
      *.*.*) wanted="transformers==$version" ;;
      *) wanted="transformers==$version.*" ;;
    esac
    # Beside, not into, the environment: torch is not among transformers' own dependencies.
    "$python" -m pip install -q --target "$folder/$version" "$wanted"
    PYTHONPATH="$folder/$version" "$python" - <<'EOF'
import transformers
print("transformers", transformers.__version__, flush=True)
EOF
    PYTHONPATH="$folder/$version" "$python" -m pytest -q -n 2 -m "not slow and not network" \
      tests/model tests/share tests/engine/test_families.py tests/sparse/test_sparsify.py
  done
done
