#!/usr/bin/env bash
# bash tools/slurm.sh PARTITION JOB CONFIG [arguments of train]
#
#   PARTITION   where the job runs
#   JOB         its name
#
# GPUS (8) processes in all, GPUS_PER_NODE (8, or GPUS if that is less) of them on each machine and
# CPUS_PER_TASK (5) cores each. GRES says what a machine is asked for (gpu:GPUS_PER_NODE; none for
# a cluster without GPUs), SRUN_ARGS is passed to srun, DEEPSPEED is as in dist.sh. A job that is
# submitted again goes on from its last checkpoint, so that `sbatch --requeue` may run this too.
set -euo pipefail

if (($# < 3)); then
    echo "usage: bash $0 PARTITION JOB CONFIG [arguments of train]" >&2
    exit 2
fi
partition="$1" job="$2" config="$3"
shift 3
gpus="${GPUS:-8}"
for count in "$gpus" "${GPUS_PER_NODE:-8}" "${CPUS_PER_TASK:-5}"; do
    if ! [[ "$count" =~ ^[1-9][0-9]*$ ]]; then
        echo "slurm.sh: error: $count was given for GPUS, GPUS_PER_NODE or CPUS_PER_TASK, a number is expected" >&2
        exit 2
    fi
done
per_node="${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}"
if ((gpus % per_node)); then
    echo "slurm.sh: error: GPUS is $gpus, a multiple of GPUS_PER_NODE, $per_node, is expected" >&2
    exit 2
fi
if ! command -v srun > /dev/null; then
    echo "slurm.sh: error: srun was not found, this must run where jobs are submitted" >&2
    exit 2
fi

tools="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$tools")"
python=python
if [[ -z "${VIRTUAL_ENV:-}" && -x "$root/.venv/bin/python" ]]; then
    python="$root/.venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
# One for all processes; the machine is the job's first, which MMEngine finds.
export MASTER_PORT="${MASTER_PORT:-$((28500 + RANDOM % 2000))}"
unset MASTER_ADDR

# Their own value, when given, follows and wins.
set -- --resume auto ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} "$@"
# shellcheck disable=SC2086  # several words
exec srun --partition="$partition" --job-name="$job" --gres="${GRES:-gpu:$per_node}" \
    --ntasks="$gpus" --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "$python" -u "$tools/train.py" "$config" --launcher slurm "$@"
