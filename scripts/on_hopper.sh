#!/usr/bin/env bash
# Everything about the kernels that only a Hopper GPU can tell, in one go of some minutes: first whether they are right
# on it, then how fast. Needs torch with CUDA and `pip install -e '.[gpu,oracle]'`. Usage: scripts/on_hopper.sh [DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/hopper}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv | tee "$out/gpu.txt"
# Ceilings; each kernel against its plain twin on the device, then its share of them; FP8 against cuBLAS in BF16 at V3's
# shapes, alone and with quantising; grouped products; decoding with 128 and with 16 heads.
python -m leanseek bench kernels --out "$out/kernels.json" --json 2> >(tee "$out/kernels.txt") > "$out/kernels-rows.json"
# A training step of `small`, BF16 and FP8, beside transformers', in turn.
python -m scripts.step_on_gpu small "$out/kernels.json" | tee "$out/step.txt"
