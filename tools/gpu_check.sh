#!/usr/bin/env bash
# Checks and measures the kernels and the engine on the GPU of this machine, from the source tree,
# installing nothing: `tools/gpu_check.sh --help`. PYTHON names the Python to use; by default the
# first that has jax, of python3 and .venv/bin/python.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
has_jax() { "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("jax") is None)' 2>/dev/null; }
python="${PYTHON:-}"
for candidate in python3 .venv/bin/python; do
  if [[ -z "$python" ]] && has_jax "$candidate"; then python="$candidate"; fi
done
if [[ -z "$python" ]]; then
  echo "gpu_check: neither python3 nor .venv/bin/python has jax; name one that does: PYTHON=..." >&2
  exit 2
fi
exec env PYTHONUNBUFFERED=1 "$python" -m tools.gpu_check "$@"
