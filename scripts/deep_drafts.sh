#!/usr/bin/env bash
# What drafts gain on a deeper model: trains twelve layers on made stories and times it with and without its MTP module,
# and beside transformers. Most of its layers are dense, as a step's cost is then the weights it reads, and verifying a
# draft reads few more. About forty minutes of training on two quiet cores for four million tokens.
#   scripts/deep_drafts.sh [FOLDER] [TOKENS]
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-build/deep} tokens=${2:-4e6} python=${PYTHON:-.venv/bin/python}

[ -e "$work/data" ] || "$python" -m leanseek prepare storyworld:14MB --out "$work/data" --validation storyworld:300KB \
    --vocab-size 3072
"$python" -m leanseek pretrain demo --data "$work/data" --out "$work/run" "train.tokens=$tokens" \
    model.num_hidden_layers=12 model.first_k_dense_replace=10 model.hidden_size=512 model.intermediate_size=1408 \
    model.num_attention_heads=4 model.q_lora_rank=96
"$python" -m leanseek bench decode --run "$work/run" --quick
