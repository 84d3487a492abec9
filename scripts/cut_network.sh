#!/usr/bin/env bash
# Cuts the network between two machines in the middle of a run, and mends it. Both are namespaces of this machine, with a
# cable between them. To be seen: the ranks say what hangs, the agents start them again from the newest checkpoint without
# anybody's help, and the weights are those of a run that nothing happened to.
#
#     scripts/cut_network.sh DATA OUT RECIPE [key=value …]
#
# Wants unshare, nsenter and ip; no root where user namespaces are allowed.
set -euo pipefail
export PYTHON="${PYTHON:-python}"
here="$(cd "$(dirname "$0")/.." && pwd)"
if [ -z "${INSIDE:-}" ]; then
    INSIDE=1 exec unshare --user --map-root-user --net "$0" "$@"
fi
data="$1" out="$2" recipe="$3"
shift 3
pretrain=("$here/launch/node.sh" pretrain "$recipe" --data "$data" train.device=cpu mesh.timeout=10 "$@")
mkdir -p "$out"
export DEVICES=1

# ── what nothing happens to ───────────────────────────────────────────────────────────────────────────────────────
ip link set lo up
DEVICES=2 "${pretrain[@]}" --out "$out/undisturbed" > "$out/undisturbed.log" 2>&1

# ── two machines and a cable ──────────────────────────────────────────────────────────────────────────────────────
unshare --net sleep infinity &
other=$!
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
until [ "$(readlink "/proc/$other/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link add here type veth peer name there
ip link set there netns "$other"
ip addr add 10.77.0.1/24 dev here
ip link set here up
over() { nsenter --target "$other" --net "$@"; }
over ip addr add 10.77.0.2/24 dev there
over ip link set there up
over ip link set lo up

# As a scheduler does: a machine whose agent gave up comes back.
machine() {
    local address="$1" interface="$2" log="$3"
    shift 3
    until NODES=2 RENDEZVOUS=10.77.0.1:29500 ADDRESS="$address" GLOO_SOCKET_IFNAME="$interface" \
        "$@" "${pretrain[@]}" --out "$out/cut" >> "$log" 2>&1; do sleep 1; done
}
machine 10.77.0.1 here "$out/here.log" env &
first=$!
machine 10.77.0.2 there "$out/there.log" nsenter --target "$other" --net &
second=$!

seen() { # waits until a pattern is in a file, or in what a command lists
    for _ in $(seq 1200); do
        if grep -qs "$1" "${@:2}"; then return; fi
        sleep 0.1
    done
    echo "waited in vain for '$1' in ${*:2}" >&2
    exit 1
}
until ls -d "$out"/cut/checkpoints/step-*[1-9]* > /dev/null 2>&1; do sleep 0.1; done
ip link set here down
echo "cut, at $(ls "$out/cut/checkpoints" | tail -n 1)"
seen "hangs for" "$out/here.log" "$out/there.log"
seen "failed (exitcode" "$out/here.log" # the processes ended, and torchrun knows
ip link set here up
echo "mended"
wait "$first" "$second"

# ── the same weights ──────────────────────────────────────────────────────────────────────────────────────────────
grep -h "hangs for\|goes on from" "$out/here.log" "$out/there.log"
"$PYTHON" - "$out" << 'END'
import sys
from pathlib import Path
from safetensors.torch import load_file

def tensors(run):
    last = max(Path(sys.argv[1], run, "checkpoints").glob("step-*"))
    return {f"{f.parent.name} {n}": t for f in last.rglob("*.safetensors") for n, t in load_file(f).items()}, last.name

(ours, step), (theirs, _) = tensors("cut"), tensors("undisturbed")
assert ours.keys() == theirs.keys()
different = [name for name in ours if not ours[name].equal(theirs[name])]
sys.exit(f"different: {different}") if different else print(f"the same weights and optimizer states, bit for bit, at {step}")
END
