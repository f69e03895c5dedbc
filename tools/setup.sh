#!/usr/bin/env bash
# Makes the virtual environment, or brings it up to date:  bash tools/setup.sh
# VENV is its folder (default: .venv in the repository), PYTHON the interpreter it is made with.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$root/.venv}"
python="${PYTHON:-python3}"

if [[ ! -x "$venv/bin/python" ]]; then
    if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))'; then
        echo "setup.sh: $("$python" --version 2>&1) was found, Python 3.10 to 3.13 is needed; set PYTHON" >&2
        exit 2
    fi
    "$python" -m venv "$venv"
fi
venv="$(cd "$venv" && pwd)"
python="$venv/bin/python"

# The stamp is written last, so that an installation cut short is taken up again.
stamp="$venv/.xtuner_ext_stamp"
wanted="$(cd "$root" && { echo "$root"; cat requirements.txt pyproject.toml hatch_build.py xtuner_ext.pth tools/setup.sh; } \
    | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    exit 0
fi

echo "setup.sh: installing into $venv" >&2
pip=("$python" -m pip install -qq)
# torch alone first: the build chosen here (CPU or a CUDA version) is the one all others accept.
"${pip[@]}" "$(grep '^torch==' "$root/requirements.txt")"
"${pip[@]}" -r "$root/requirements.txt"
# xtuner 0.2.0 asks for Python < 3.13 and for older dependencies than it is run with here.
"${pip[@]}" --no-deps --ignore-requires-python xtuner==0.2.0
"${pip[@]}" --no-deps -e "$root"
echo "$wanted" > "$stamp"
echo "setup.sh: $venv is ready" >&2
