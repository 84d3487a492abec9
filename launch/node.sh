#!/usr/bin/env bash
# One machine's part of a run: starts a process for each of its devices, under PyTorch's elastic agent. The same line on
# every machine; on one machine, without the variables:
#
#     NODES=2 RENDEZVOUS=first-machine:29500 launch/node.sh pretrain v2-lite --data DATA --out RUN [key=value …]
#
# A process that dies, and a machine that comes back, has all processes start again from the newest checkpoint. SIGTERM
# finishes the step at hand and saves. RUN, and best DATA too, are on storage that all machines see.
set -euo pipefail

: "${NODES:=1}"                    # machines
: "${DEVICES:=auto}"               # processes on each: auto counts GPUs, or cores where there is none
: "${RENDEZVOUS:=localhost:0}"     # host:port where the machines meet, on one of them
: "${ADDRESS:=}"                   # this one's address, where its name does not lead to it
: "${JOB:=leanseek}"               # what this run is called there
: "${RESTARTS:=10}"                # how often all may start again before somebody has to look
: "${PYTHON:=python}"

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-600}" # seconds from SIGTERM to SIGKILL: a step and a checkpoint
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else processes find the addresses of those before the restart
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

where=()
if [ -n "$ADDRESS" ]; then # then it is also plain which machine keeps the meeting place
    [ "${RENDEZVOUS%:*}" = "$ADDRESS" ] && host=true || host=false
    where=(--local-addr "$ADDRESS" --rdzv-conf "is_host=$host")
fi

exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NODES" --nproc-per-node "$DEVICES" \
    --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$JOB" \
    --max-restarts "$RESTARTS" "${where[@]}" \
    -m leanseek "$@"
