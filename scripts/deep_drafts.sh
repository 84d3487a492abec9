#!/usr/bin/env bash
# What drafts gain on a deeper model: trains twelve layers on made stories and times it with and without its MTP module,
# and beside transformers. Most of its layers are dense, as a step's cost is then the weights it reads, and verifying a
# draft reads few more. A plain V3, trained without nano's method, so that transformers gets the same shapes. About forty minutes of training on two quiet cores for four million tokens.
#   scripts/deep_drafts.sh [FOLDER] [TOKENS]
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-build/deep} tokens=${2:-4e6} python=${PYTHON:-.venv/bin/python}

[ -e "$work/data" ] || "$python" -m leanseek prepare storyworld:14MB --out "$work/data" --validation storyworld:300KB \
    --vocab-size 4096
"$python" -m leanseek pretrain demo --data "$work/data" --out "$work/run" "train.tokens=$tokens" \
    model.num_hidden_layers=12 model.first_k_dense_replace=10 model.hidden_size=512 model.intermediate_size=1408 \
    model.num_attention_heads=4 model.q_lora_rank=96 model.vocab_size=4096 \
    model.value_embeddings=false model.embedding_shares=false train.zero_outputs=false train.embedding_std=none \
    train.init_std=0.02 train.mtp_length=none optimizer.beta1=0.9 optimizer.embedding_rate=1 \
    'schedule.learning_rate=[{until=0.005,value=6e-3,shape="linear"},{until=0.6,value=6e-3},{until=1.0,value=0.0,shape="linear"}]' \
    'schedule.mtp_weight=[{until=0.67,value=0.3},{until=1.0,value=0.1}]'
"$python" -m leanseek bench decode --run "$work/run" --quick
