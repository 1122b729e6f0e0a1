#!/usr/bin/env bash
# Start a run on one node or on several.
#
#   launch/torchrun.sh CONFIG [--section.key VALUE ...]
#
# One node:       launch/torchrun.sh configs/digits.yaml
# Several nodes:  the same command on each, with NNODES and the first node's address:
#                 NNODES=4 MASTER_ADDR=node0 launch/torchrun.sh configs/imagenet_goyal_8k.yaml
#
# Environment:
#   NPROC_PER_NODE  processes on this node (default: the number of GPUs; without a GPU, 1)
#   NNODES          number of nodes, or MIN:MAX for an elastic job (default 1)
#   MASTER_ADDR     host name of the first node (default localhost; needed for several nodes)
#   MASTER_PORT     free port there (default 29500)
#   JOB_ID          name of the job, the same on each node (default largebatch)
#   MAX_RESTARTS    restarts after a failed process (default 0)
#   TORCHRUN        the torchrun to start (default: torchrun)
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-
    exit 2
fi

NNODES=${NNODES:-1}
TORCHRUN=${TORCHRUN:-torchrun}
if [[ -z ${NPROC_PER_NODE:-} ]]; then
    # "gpu" counts those that CUDA_VISIBLE_DEVICES leaves.
    if nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; then NPROC_PER_NODE=gpu; else NPROC_PER_NODE=1; fi
fi
if [[ $NNODES != 1 && -z ${MASTER_ADDR:-} ]]; then
    echo "torchrun.sh: NNODES is $NNODES, so MASTER_ADDR must name the first node" >&2
    exit 2
fi

# The workers' store shared with the rendezvous hangs for a minute and then fails when a node is replaced (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [[ $NNODES == 1 ]]; then
    where=(--standalone)
else
    where=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id="${JOB_ID:-largebatch}")
fi
exec "$TORCHRUN" "${where[@]}" --nproc-per-node="$NPROC_PER_NODE" --max-restarts="${MAX_RESTARTS:-0}" -m largebatch train "$@"
