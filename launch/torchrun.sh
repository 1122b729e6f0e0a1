#!/usr/bin/env bash
# Start a run on one node or on several, or continue it.
#
#   launch/torchrun.sh CONFIG [--out DIR] [--section.key VALUE ...]
#
# One node:       launch/torchrun.sh configs/digits.yaml
# Several nodes:  the same command on each, with NNODES and the first node's address:
#                 NNODES=4 MASTER_ADDR=node0 launch/torchrun.sh configs/imagenet_goyal_8k.yaml --out runs/goyal
#
# With --out the run continues from the newest checkpoint there (--resume auto, unless --resume is given), so that the same
# command starts it, starts it again after a failure, and goes on after a pre-emption. Nodes share that folder.
#
# Environment:
#   NPROC_PER_NODE    processes on this node (default: the number of GPUs; without a GPU, 1)
#   NNODES            number of nodes, or MIN:MAX for an elastic job (default 1)
#   MASTER_ADDR       host name of the first node (default localhost; needed for several nodes)
#   MASTER_PORT       free port there (default 29500)
#   JOB_ID            name of the job, the same on each node (default largebatch)
#   MAX_RESTARTS      restarts after a failed process or a node that left (default 0; 10 for an elastic job); they need --out
#   SHUTDOWN_SECONDS  after a signal, time for the processes to write a checkpoint before they are killed (default 120)
#   TORCHRUN          the torchrun to start (default: torchrun)
# Where PET_NNODES is set (Kubeflow Trainer), torchrun reads nodes, processes and addresses from PET_* by itself.
#
# Signals: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C are passed on; the processes finish their update and write a checkpoint. Under
# nohup SIGHUP does nothing. The job goes on when nobody reads its output any more.
#
# Exit codes: 0 finished, 75 stopped by a signal or its time limit (start it again), 130 stopped by Ctrl-C, 3 diverged, 4 the
# last state could not be written, 2 wrong usage of this script, 1 everything else; what happened stands above.
set -euo pipefail

# A run outlives its output: a message that nobody reads ends nothing, and no file gets the number of a closed descriptor.
trap '' PIPE
[[ -e /dev/fd/1 ]] || exec >/dev/null
[[ -e /dev/fd/2 ]] || exec 2>/dev/null

if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-
    exit 2
fi

out='' resume=''
words=("$@")
for ((i = 0; i < ${#words[@]}; i++)); do
    case ${words[i]} in
    --out) out=${words[i + 1]:-} ;;
    --out=*) out=${words[i]#--out=} ;;
    --resume | --resume=*) resume=given ;;
    esac
done
if [[ -n $out && -z $resume ]]; then words+=(--resume auto); fi

NNODES=${NNODES:-1}
TORCHRUN=${TORCHRUN:-torchrun}
if [[ $NNODES == *:* ]]; then MAX_RESTARTS=${MAX_RESTARTS:-10}; else MAX_RESTARTS=${MAX_RESTARTS:-0}; fi
if [[ $MAX_RESTARTS != 0 && -z $out ]]; then
    echo "torchrun.sh: MAX_RESTARTS is $MAX_RESTARTS, so --out must name the run folder that a restarted run continues" >&2
    exit 2
fi
if [[ $NNODES != 1 && -z ${MASTER_ADDR:-} ]]; then
    echo "torchrun.sh: NNODES is $NNODES, so MASTER_ADDR must name the first node" >&2
    exit 2
fi

# The workers' store shared with the rendezvous hangs for a minute and then fails when a node is replaced (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_SECONDS:-120}

# The flag: torchrun overwrites TORCHELASTIC_SIGNALS_TO_HANDLE with it.
signals=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
if [[ $(trap -p HUP) == *"''"* ]]; then signals=${signals/SIGHUP,/}; fi # under nohup, which torchrun would undo
how=(--max-restarts="$MAX_RESTARTS" --signals-to-handle="$signals")
if [[ -z ${PET_NNODES:-} ]]; then
    if [[ -z ${NPROC_PER_NODE:-} ]]; then
        # "gpu" counts those that CUDA_VISIBLE_DEVICES leaves.
        if nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; then NPROC_PER_NODE=gpu; else NPROC_PER_NODE=1; fi
    fi
    how+=(--nproc-per-node="$NPROC_PER_NODE")
    if [[ $NNODES == 1 ]]; then
        how+=(--standalone)
    else
        how+=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}")
        how+=(--rdzv-id="${JOB_ID:-largebatch}")
    fi
fi

# Status of the run's summary, where it is not the one that was there before: torchrun makes 1 of every worker's code.
identify() { stat -c '%i %Y' "$out/summary.json" 2>/dev/null || true; }
read_status() {
    if [[ -n $out && $(identify) != "$before" ]]; then
        sed -n 's/^ *"status": "\([a-z]*\)".*/\1/p' "$out/summary.json" 2>/dev/null || true
    fi
}
before=$(identify)

caught='' child=''
# shellcheck disable=SC2329  # trap calls it
pass_on() {
    caught=$1
    if [[ -n $child ]]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}
for name in TERM USR1 INT HUP; do
    # shellcheck disable=SC2064  # the name of now is meant
    trap "pass_on $name" "$name"
done
# A background process starts with SIGINT ignored, and would not hear of Ctrl-C while it imports torch.
(
    trap - INT QUIT
    exec "$TORCHRUN" "${how[@]}" -m largebatch train "${words[@]}"
) &
child=$!
if [[ -n $caught ]]; then pass_on "$caught"; fi
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ends wait
    code=0
    wait "$child" || code=$?
done

status=$(read_status)
if [[ $code != 0 && -z $caught && ${PET_NNODES:-$NNODES} != 1 ]]; then
    # The first node's process writes the summary, when the others may be gone.
    for ((i = 0; i < 20 && ${#status} == 0; i++)); do
        sleep 0.5
        status=$(read_status)
    done
fi
if [[ $code != 0 && -z $status$caught ]]; then
    # Below the tracebacks of torchrun.
    again=''
    if [[ -n $out ]]; then again="; once that is mended, the same command continues from the newest checkpoint in $out"; fi
    if [[ -n $out && $NNODES != 1 ]]; then again+=" (on each node; with another's MASTER_ADDR where $MASTER_ADDR is lost)"; fi
    echo "torchrun.sh: exit code $code: why is in the line above that begins with largebatch:$again" >&2 || true
fi
case $status:$caught in
finished:?*) exit 0 ;; # the signal came too late to matter
preempted:*) exit 75 ;;
interrupted:* | :INT) exit 130 ;;
diverged:*) exit 3 ;;
unsaved:*) exit 4 ;;
:?*) exit 75 ;; # before there was anything to summarise
*) exit "$code" ;;
esac
