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
#   MASTER_ADDR       address of the first node that all nodes know (default localhost; needed for several nodes)
#   MASTER_PORT       free port there (default: one of 20000 to 29999, by JOB_ID)
#   PATIENCE_SECONDS  how long a node may take to know the name in MASTER_ADDR, and the others to come before it says so (default 60)
#   JOB_ID            name of the job, the same on each node and no other's (default: made of --out, which several nodes need)
#   MAX_RESTARTS      restarts after a failed process or a node that left (default 0; 10 for an elastic job); they need --out
#   MAX_STARTS        how often torchrun itself is started where it fails (default 1); more need --out
#   PAUSE_SECONDS     between two starts (default 5)
#   SHUTDOWN_SECONDS  after a signal, time for the processes to write a checkpoint before they are killed (default 120)
#   TORCHRUN          the torchrun to start (default: torchrun)
# Where PET_NNODES is set (Kubeflow Trainer), torchrun reads nodes, processes and addresses from PET_* by itself.
#
# Signals: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C are passed on; the processes finish their update and write a checkpoint. Under
# nohup SIGHUP does nothing. The job goes on when nobody reads its output any more.
#
# Exit codes: those of largebatch train: 0 finished, 75 stopped by a signal or its time limit (start it again), 130 stopped by
# Ctrl-C, 2 a mistake, 3 diverged, 4 the last state could not be written, 5 lost a rank, 6 lost a process that loads data; 1
# everything else. What happened stands above. After 2 and 3 nothing is started again: it would end alike.
set -euo pipefail

{ # read as a whole before it begins: the file may be changed under a long run

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

fail() {
    echo "torchrun.sh: $1" >&2
    exit 2
}

# Each would train alone, into one folder.
if [[ -z ${NNODES:-}${PET_NNODES:-} && ${SLURM_STEP_NUM_TASKS:-1} -gt 1 ]]; then
    fail "this is one of $SLURM_STEP_NUM_TASKS tasks of Slurm and NNODES is not set: submit launch/slurm.sbatch, or set NNODES and MASTER_ADDR (NNODES=1 where each task is a run of its own)"
fi
NNODES=${NNODES:-1}
TORCHRUN=${TORCHRUN:-torchrun}
MAX_STARTS=${MAX_STARTS:-1}
if [[ $NNODES == *:* ]]; then MAX_RESTARTS=${MAX_RESTARTS:-10}; else MAX_RESTARTS=${MAX_RESTARTS:-0}; fi
if [[ $MAX_RESTARTS:$MAX_STARTS != 0:1 && -z $out ]]; then
    fail "MAX_RESTARTS is $MAX_RESTARTS, MAX_STARTS $MAX_STARTS, so --out must name the run folder that a restarted run continues"
fi
if ! type -P "$TORCHRUN" >/dev/null; then
    fail "there is no '$TORCHRUN' on this node (${HOSTNAME:-}): activate the environment that largebatch is installed in, or let TORCHRUN name its torchrun"
fi

# Prints this node's address on the way to the first one, as its own name for itself may lead nowhere from the others; and,
# where it does not know its own name, which torchrun asks for, whether it is the first one.
find_address() {
    python3 - "$MASTER_ADDR" "${PATIENCE_SECONDS:-60}" <<'END'
import socket, sys, time
name, deadline = sys.argv[1], time.monotonic() + float(sys.argv[2])
while True:
    try:
        found = socket.getaddrinfo(name, 1, type=socket.SOCK_DGRAM)
        break
    except (OSError, UnicodeError) as error:  # a name server may come to know it a while after the node was started
        if time.monotonic() > deadline:
            sys.exit(getattr(error, "strerror", None) or str(error))
        time.sleep(1)
family, _, _, _, there = min(found, key=lambda entry: entry[0] != socket.AF_INET)
with socket.socket(family, socket.SOCK_DGRAM) as probe:
    try:
        probe.connect(there)  # sends nothing
    except OSError as error:
        sys.exit(f"no way to {there[0]}: {error.strerror}")
    here = probe.getsockname()[0]
is_first = here in ("::1", there[0]) or here.startswith("127.")
print(name if here == "::1" or here.startswith("127.") else here)
try:
    socket.getaddrinfo(socket.gethostname(), None)
    print()
except (OSError, UnicodeError):
    print(f"is_host={int(is_first)}")
END
}

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
        if [[ -z ${MASTER_ADDR:-} ]]; then fail "NNODES is $NNODES, so MASTER_ADDR must name the first node"; fi
        if [[ -z $out && -z ${JOB_ID:-} ]]; then
            fail "NNODES is $NNODES, so --out must name the run folder (or JOB_ID the job): by it the nodes of a run find each other, and no other's"
        fi
        if [[ -n ${MASTER_PORT:-} && (! $MASTER_PORT =~ ^[1-9][0-9]{0,4}$ || $MASTER_PORT -gt 65535) ]]; then
            fail "MASTER_PORT: expected a port, 1 to 65535, got '$MASTER_PORT'"
        fi
        folder=${out%/}
        if [[ $folder != /* ]]; then folder=$PWD/${folder#./}; fi
        read -r number _ < <(cksum <<<"${JOB_ID:-$folder}")
        JOB_ID=${JOB_ID:-largebatch-$number}
        where=$MASTER_ADDR:${MASTER_PORT:-$((20000 + number % 10000))}
        how+=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$where" --rdzv-id="$JOB_ID")
        rendezvous=''
        if [[ -z ${PET_LOCAL_ADDR:-} ]] && type -P python3 >/dev/null; then
            if ! python3 -c 'import socket; socket.getaddrinfo("localhost", 1)' 2>/dev/null; then
                fail "this node (${HOSTNAME:-}) does not know localhost, which torchrun needs: add the line 127.0.0.1 localhost to its /etc/hosts"
            fi
            found=$(find_address 2>&1) || fail "MASTER_ADDR: $MASTER_ADDR cannot be found from this node (${HOSTNAME:-}: ${found##*$'\n'}); name the first node by an address that every node knows"
            mapfile -t found <<<"$found"
            how+=(--local-addr="${found[0]}")
            if [[ -n ${found[1]:-} ]]; then rendezvous+=",${found[1]}"; fi
        fi
        # A node whose clock is behind counts as dead. Where no other could take its place, that may wait for two minutes.
        if [[ $MAX_RESTARTS == 0 ]]; then rendezvous+=,keep_alive_max_attempt=24; fi
        if [[ -n $rendezvous && -z ${PET_RDZV_CONF:-} ]]; then how+=(--rdzv-conf="${rendezvous#,}"); fi
    fi
fi

# The processes write their exit codes there, and that they have begun: torchrun makes 1 of every code. Where one folder alone
# can be written, it serves torchrun too, which needs a place for temporary files.
codes='' beside=$(dirname "${out:-./x}")
until [[ -d $beside ]]; do beside=$(dirname "$beside"); done
for place in "${TMPDIR:-/tmp}" /tmp /var/tmp "$beside" /dev/shm; do
    if scratch=$(mktemp -d "$place/.largebatch-XXXXXX" 2>/dev/null); then
        trap 'rm -rf "$scratch"' EXIT
        codes=$scratch/codes
        if [[ $place != "${TMPDIR:-/tmp}" ]]; then export TMPDIR=$scratch; fi
        break
    fi
done
export LARGEBATCH_EXIT_CODES=$codes

caught='' child='' reminder=''
# shellcheck disable=SC2329  # trap calls it
pass_on() {
    caught=$1
    if [[ -n $child ]]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}
for name in TERM USR1 INT HUP; do
    # shellcheck disable=SC2064  # the name of now is meant
    trap "pass_on $name" "$name"
done

# Say after a minute that the nodes have not come together, which torchrun waits for in silence.
remind() {
    local sleeper=''
    trap 'if [[ -n $sleeper ]]; then kill "$sleeper"; fi; exit' TERM
    sleep "${PATIENCE_SECONDS:-60}" >/dev/null 2>&1 &
    sleeper=$!
    wait "$sleeper"
    if [[ ! -s $codes ]]; then
        echo "torchrun.sh: this node (${HOSTNAME:-}) has waited ${PATIENCE_SECONDS:-60} s for the others: NNODES is $NNODES, they meet at $where; see that the same command was started on each, from the same folder" >&2
    fi
}

# Start torchrun, and wait for it; its exit code is in $code.
run_torchrun() {
    if [[ -n $codes ]]; then : >"$codes"; fi
    # A background process starts with SIGINT ignored, and would not hear of Ctrl-C while it imports torch.
    (
        trap - INT QUIT
        export PET_NNODES=${PET_NNODES:-$NNODES} # as torchrun would read it: its processes see that as many have come
        exec "$TORCHRUN" "${how[@]}" -m largebatch train "${words[@]}"
    ) &
    child=$!
    if [[ -n ${where:-} && -n $codes ]]; then
        remind &
        reminder=$!
    fi
    if [[ -n $caught ]]; then pass_on "$caught"; fi
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends wait
        code=0
        wait "$child" || code=$?
    done
    if [[ -n $reminder ]]; then
        kill "$reminder" 2>/dev/null || true
        wait "$reminder" || true
    fi
}

# Make the exit code of this node out of torchrun's and those of the processes, in the order in which they ended.
read_codes() {
    local ended=() own=''
    if [[ -n $codes ]]; then mapfile -t ended < <(grep -x '[0-9][0-9]*' "$codes"); fi
    if [[ ${#ended[@]} != 0 ]]; then own=${ended[-1]}; fi
    if [[ $code != 0 && " ${ended[*]} " == *" 2 "* ]]; then own=2; fi # where others were lost by it
    case $own:$caught in
    0:?*) code=0 ;; # the signal came too late to matter
    0:) ;;
    2:* | 3:* | 4:* | 75:* | 130:*) code=$own ;;
    *:INT) code=130 ;;
    *:?*) code=75 ;;
    [0-9]*:) if [[ $code != 0 ]]; then code=$own; fi ;;
    esac
}

for ((start = 1; ; start++)); do
    run_torchrun
    torchruns=$code
    read_codes
    # 75 from a torchrun that ended well is a time limit; else another node was stopped, and this one goes on when it comes back.
    case $code:$torchruns in 0:* | 2:* | 3:* | 75:0 | 130:*) break ;; esac
    if [[ -n $caught ]] || ((start >= MAX_STARTS)); then break; fi
    echo "torchrun.sh: exit code $code: start $((start + 1)) of at most $MAX_STARTS" >&2 || true
    sleep "${PAUSE_SECONDS:-5}"
    if [[ -n $caught ]]; then break; fi
done

if [[ ! $code =~ ^(0|3|4|75|130)$ && -z $caught ]]; then
    # Below the tracebacks of torchrun.
    why='why is in the line above that begins with largebatch:'
    if [[ -n ${where:-} && -n $codes && ! -s $codes ]]; then
        why="no process of this node has begun: the nodes did not come together at $where; another node's log may say why, and each needs the same command, a way to that address, and the right time"
    elif [[ -n ${where:-} && -n $codes ]] && ! grep -q '[0-9]' "$codes"; then
        why="no process of this node came to say why: see above, and the other nodes' logs"
    fi
    again=''
    if [[ -n $out ]]; then again="; once that is mended, the same command continues from the newest checkpoint in $out"; fi
    if [[ -n $out && $NNODES != 1 ]]; then again+=" (on each node; with another's MASTER_ADDR where $MASTER_ADDR is lost)"; fi
    echo "torchrun.sh: exit code $code: $why$again" >&2 || true
fi
exit "$code"
}
