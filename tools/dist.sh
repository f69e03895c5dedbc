#!/usr/bin/env bash
# bash tools/dist.sh FILE CONFIG GPUS [arguments of FILE]
#
#   FILE    train, test, or pipeline (CONFIG is then a folder of projects/)
#   GPUS    processes on this machine; on a machine without GPUs, CPU processes
#
# DEEPSPEED (a name such as deepspeed_zero2, or a json file) trains with DeepSpeed. Several
# machines: run it on each with the same NNODES, MASTER_ADDR (the address of the first one) and
# PORT (a free one there), its own NODE_RANK (0, 1, ...) and a work_dir that all of them see.
set -euo pipefail

if (($# < 3)); then
    echo "usage: bash $0 {train|test|pipeline} CONFIG GPUS [arguments]" >&2
    exit 2
fi
file="$1" config="$2" gpus="$3"
shift 3

tools="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$tools")"
case "$file" in
    train | test | pipeline) ;;
    *)
        echo "dist.sh: error: $file was given, train, test or pipeline is expected" >&2
        exit 2
        ;;
esac
if ! [[ "$gpus" =~ ^[1-9][0-9]*$ ]]; then
    echo "dist.sh: error: $gpus was given for GPUS, a number of processes is expected" >&2
    exit 2
fi

python=python
if [[ -z "${VIRTUAL_ENV:-}" && -x "$root/.venv/bin/python" ]]; then
    python="$root/.venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [[ "$file" != test && -n "${DEEPSPEED:-}" ]]; then
    set -- --deepspeed "$DEEPSPEED" "$@"
fi
nnodes="${NNODES:-1}"
if ! [[ "$nnodes" =~ ^[1-9][0-9]*$ ]]; then
    echo "dist.sh: error: NNODES is $nnodes, a number of machines is expected" >&2
    exit 2
fi
if ((nnodes > 1)); then
    for name in NODE_RANK MASTER_ADDR PORT; do
        if [[ -z "${!name:-}" ]]; then
            echo "dist.sh: error: NNODES is $nnodes and $name is not set:" \
                "every machine needs the same MASTER_ADDR and PORT and its own NODE_RANK" >&2
            exit 2
        fi
    done
    if ! [[ "$NODE_RANK" =~ ^[0-9]+$ ]] || ((NODE_RANK >= nnodes)); then
        echo "dist.sh: error: NODE_RANK is $NODE_RANK, 0 to $((nnodes - 1)) is expected" >&2
        exit 2
    fi
fi
if [[ "$file" == pipeline ]]; then
    exec "$python" "$tools/pipeline.py" "$config" --nproc "$gpus" "$@"
fi
# DeepSpeed wants a process group even for one process.
if ((gpus == 1 && nnodes == 1)) && [[ " $* " != *" --deepspeed"* ]]; then
    exec "$python" "$tools/$file.py" "$config" "$@"
fi

# Processes that share the cores of one machine are many times slower with several threads each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
exec "$python" -m torch.distributed.run \
    --nnodes="$nnodes" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-$((28500 + RANDOM % 2000))}" \
    "$tools/$file.py" "$config" --launcher pytorch "$@"
