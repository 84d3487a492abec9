#!/usr/bin/env bash
# llama.cpp loads the GGUF file of a model trained here: its greedy text must be ours, for five prompts, in FP32.
# Makes build/llama (a virtual environment of its own; llama-cpp-python is compiled, about ten minutes) and build/check
# (data, run, export). With a folder as argument, takes the run that is there instead of training one.
set -euo pipefail
cd "$(dirname "$0")/.."
work=build/check python=${PYTHON:-.venv/bin/python} llama=build/llama
export OMP_NUM_THREADS=1

if [ ! -e "$llama/ready" ]; then
    "$python" -m venv "$llama"
    "$llama/bin/pip" install --quiet llama-cpp-python==0.3.36
    touch "$llama/ready"
fi

run=${1:-$("$python" scripts/small_run.py "$work")}
rm -rf "$work/llama"
"$python" -m leanseek export "$run" "$work/llama" --dtype fp32 --format gguf
"$python" scripts/greedy.py ours "$run" > "$work/ours.jsonl"
"$llama/bin/python" scripts/greedy.py llama "$work/llama/model-fp32.gguf" > "$work/llama.jsonl" 2> "$work/llama.log" ||
    { tail -n 20 "$work/llama.log"; exit 1; }
"$python" scripts/greedy.py compare "$work/ours.jsonl" "$work/llama.jsonl"
