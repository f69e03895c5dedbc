#!/usr/bin/env bash
# Installs what is missing and runs the tests:  bash tools/test.sh [pytest arguments]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tools/setup.sh"
python="$(cd "${VENV:-$root/.venv}" && pwd)/bin/python"

cd "$root"
# Two processes with a thread each are faster than one with two; files stay together for what their tests share.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
exec "$python" -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile tests "$@"
