#!/usr/bin/env bash
# Starts training on whatever is there: no GPU, one, several, or several machines.
#
#   scripts/launch.sh DEFAULT_CONFIG [--config PATH] [--dry_run] [--name value ...]
#
# --dry_run also shows what would be started, and needs none of the GPUs and machines named.
# The stages' train_*.sh call it with their config. From the environment:
#   CUDA_VISIBLE_DEVICES or GPU_IDS   the GPUs, "0,1,4"; all by default, "" for none
#   NUM_PROCESSES                     processes over all machines; one per GPU by default
#   ACCELERATE_CONFIG_FILE            an accelerate config, such as scripts/accelerate/fsdp2.yaml; with several
#                                     processes scripts/accelerate/ddp.yaml by default. On CPUs it is DDP always
#   MASTER_ADDR, MASTER_PORT          first machine's address and port, when there are several machines
#   NNODES (or WORLD_SIZE)            number of machines
#   NODE_RANK (or RANK)               which one this is, from 0
#   PYTHON                            the interpreter; the active environment's or .venv's by default
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
default_config="$root/$1"
shift
arguments=("$@")
if [[ " $* " != *" --config"[\ =]* ]]; then
    arguments=(--config "$default_config" "$@")
fi

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    if [[ -n "${VIRTUAL_ENV:-}" || (-n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-}" != base) ]]; then
        PYTHON=python
    elif [[ -x "$root/.venv/bin/python" ]]; then
        PYTHON="$root/.venv/bin/python"
    fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# GPUs of this machine
if [[ -n "${GPU_IDS+set}" ]]; then
    export CUDA_VISIBLE_DEVICES="$GPU_IDS"
fi
if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    gpus=0
    if [[ -n "$CUDA_VISIBLE_DEVICES" && "$CUDA_VISIBLE_DEVICES" != -1 ]]; then
        IFS=, read -r -a gpu_list <<< "$CUDA_VISIBLE_DEVICES"
        gpus=${#gpu_list[@]}
    fi
elif command -v nvidia-smi > /dev/null; then
    gpus="$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU' || true)"
else
    gpus=0
fi

if ((gpus == 0)); then
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"  # waiting threads must not take the cores from working ones
fi

machines="${NNODES:-${WORLD_SIZE:-1}}"
machine_rank="${NODE_RANK:-${RANK:-0}}"
number='^[0-9]+$'
[[ "$machines" =~ $number && "$machine_rank" =~ $number ]] && ((machine_rank < machines)) \
    || fail "NODE_RANK is $machine_rank; of NNODES $machines machines it counts from 0"
processes="${NUM_PROCESSES:-$(((gpus > 0 ? gpus : 1) * machines))}"
[[ "$processes" =~ $number ]] && ((processes > 0 && processes % machines == 0)) \
    || fail "NUM_PROCESSES is $processes; over all machines it must be a multiple of their number, $machines"
unset RANK WORLD_SIZE LOCAL_RANK  # the machine's, which a single process would take for its own

if [[ "$processes" == 1 && -z "${ACCELERATE_CONFIG_FILE:-}" ]]; then
    exec "$PYTHON" -m common.tools.train "${arguments[@]}"
fi

accelerate_config="${ACCELERATE_CONFIG_FILE:-$root/scripts/accelerate/ddp.yaml}"
[[ -f "$accelerate_config" ]] || fail "ACCELERATE_CONFIG_FILE: $accelerate_config does not exist"
launch=(
    "$PYTHON" -m common.tools.launch --config_file "$accelerate_config"
    --num_processes "$processes" --num_machines "$machines" --machine_rank "$machine_rank"
)
if ((machines > 1)); then
    [[ -n "${MASTER_ADDR:-}" ]] || fail "several machines need MASTER_ADDR, the address of the first"
    launch+=(--main_process_ip "$MASTER_ADDR" --main_process_port "${MASTER_PORT:-29500}")
else
    launch+=(--main_process_port 0)  # any free one
fi
launch+=(-m common.tools.train "${arguments[@]}")
if [[ " $* " == *" --dry_run "* ]]; then
    exec "${launch[@]}"
fi

((gpus == 0 || processes / machines <= gpus)) \
    || fail "NUM_PROCESSES is $processes on $machines machines, and this one has $gpus GPUs"
# A wrong setting is reported here, in one line, and not by every process and its launcher.
WORLD_SIZE="$processes" "$PYTHON" -m common.tools.train "${arguments[@]}" --check
if ((gpus == 0)); then
    export ACCELERATE_USE_CPU=true
fi

# The launcher would answer SIGTERM or Ctrl-C by killing the training processes, 30 seconds later at best. So it is deaf
# to both; they are handed to the training processes, which save a checkpoint and leave, and then the launcher leaves
# with their exit code.
export PET_SIGNALS_TO_HANDLE=SIGHUP,SIGQUIT
(
    trap '' TERM INT
    exec "${launch[@]}"
) &
launcher=$!
signals=0
hand_on() {
    signals=$((signals + 1))
    local children
    children="$(cat "/proc/$launcher/task/"*/children 2> /dev/null || true)"
    # shellcheck disable=SC2086  # a list of numbers
    kill -TERM $children 2> /dev/null || true
}
trap hand_on TERM INT
while
    seen=$signals code=0
    wait "$launcher" || code=$?
    ((signals != seen))  # a trapped signal ends `wait` early
do :; done
exit "$code"
