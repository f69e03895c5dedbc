#!/usr/bin/env bash
# Installs what is missing and distils the digits teacher into two students:  bash tools/quickstart.sh
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tools/setup.sh"
venv="$(cd "${VENV:-$root/.venv}" && pwd)"

cd "$root"
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv" TOKENIZERS_PARALLELISM=false
exec bash tools/dist.sh pipeline projects/mmmamba/digits 1 --work-dir work_dirs/quickstart "$@"
