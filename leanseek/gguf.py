"""A run as one GGUF file for llama.cpp: its `deepseek2` architecture, tokenizer included, MTP modules left out.

llama.cpp attends over the latent, as our absorbed form does: it wants the two halves of `kv_b_proj` apart, the keys'
half transposed, and takes the model for one with a single key head. Experts are stacks there as they are here, but gate
and up apart. Matrices are FP32 or BF16; norms, routers and their biases are FP32.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanseek.config import BadInput, ModelConfig
from leanseek.data.tokenizer import SPLITS, Tokenizer
from leanseek.hub import Weights, progress
from leanseek.weightfiles import Planned, staged

ARCHITECTURE = "deepseek2"
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
STACKS = {"gate_proj": "ffn_gate_exps.weight", "up_proj": "ffn_up_exps.weight", "down_proj": "ffn_down_exps.weight"}
PRECISE = ("ffn_gate_inp.weight", "exp_probs_b.bias")

# How llama.cpp calls the splits that come before BPE, for tokenizers that do not have V3's.
PRE_TOKENIZER = {"deepseek_v2": "deepseek-llm", "kimi_k2": "kimi-k2"}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # token types


def export_gguf(run: Path, folder: Path, dtype: str | None = None, averaged: bool = False) -> None:
    """Write FOLDER/model-<precision>.gguf: matrices in `dtype`, else as they are stored, FP8 as BF16.

    Raises BadInput.
    """
    try:
        import gguf
    except ImportError:
        raise BadInput("writing GGUF needs the gguf package: pip install 'leanseek[gguf]'") from None
    if dtype == "fp8":
        raise BadInput("GGUF has no FP8: take --dtype bf16 or fp32")
    weights = Weights(run, averaged)
    if dtype is None:
        dtype = "fp32" if weights.dtype("lm_head.weight") == torch.float32 else "bf16"
    matrix = torch.float32 if dtype == "fp32" else torch.bfloat16
    planned = list(_tensors(weights, matrix))
    tokenizer = _tokenizer(run, weights.model)
    needed = sum(tensor.nbytes for tensor in planned)
    with staged(folder, f"gguf {run.absolute()} {dtype}", needed) as writing:
        writer = gguf.GGUFWriter(writing / f"model-{dtype}.gguf", ARCHITECTURE)
        _describe(writer, weights.model, run.resolve().name)
        for key, value in tokenizer.items():
            getattr(writer, f"add_{key}")(value)
        for tensor in planned:
            kind = gguf.GGMLQuantizationType[{torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]]
            writer.add_tensor_info(tensor.name, tensor.shape, torch.empty(0).numpy().dtype, tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        with progress(f"export {run.name}", needed) as advance:
            for tensor in planned:
                writer.write_padding(file, file.tell())
                tensor.write(file, advance)
                writer.write_padding(file, file.tell())
        writer.close()


def _describe(writer: Any, config: ModelConfig, name: str) -> None:
    """The model's numbers under llama.cpp's names."""
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)  # of a head, over the latent …
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)  # … and expanded
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_uint32(f"{ARCHITECTURE}.expert_gating_func", {"softmax": 1, "sigmoid": 2}[config.scoring_func])
    if config.topk_method == "noaux_tc" and config.topk_group < config.n_group:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if config.topk_method == "group_limited_greedy" and config.topk_group < config.n_group:
        line = "llama.cpp does not know V2's choice of groups by their best expert: it will choose among all experts"
        print(f"warning: {line}", file=sys.stderr)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if yarn := config.rope_scaling:
        writer.add_string(f"{ARCHITECTURE}.rope.scaling.type", "yarn")
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
        writer.add_rope_scaling_yarn_log_mul(0.1 * yarn.mscale_all_dim)


def _tokenizer(run: Path, config: ModelConfig) -> dict[str, Any]:
    """The tokenizer under the names of the writer's methods; rows of the embedding without a token are `[PADn]`."""
    tree = json.loads((run / "tokenizer" / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer.load(run / "tokenizer")
    pre = "deepseek-v3"
    if tokenizer.splits != SPLITS:
        family = config.verbatim.get("model_type", config.model_type)
        if family not in PRE_TOKENIZER:
            raise BadInput(f"{run / 'tokenizer'}: splits text in a way that llama.cpp has no name for")
        pre = PRE_TOKENIZER[family]
    tokens = [f"[PAD{number}]" for number in range(config.vocab_size)]
    types = [UNUSED] * config.vocab_size
    for token, number in tree["model"]["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for token, number in tokenizer.special.items():
        tokens[number], types[number] = token, CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"]]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": tokens,
        "token_types": types,
        "token_merges": merges,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": tokenizer.chat_template,
    }


def _tensors(weights: Weights, matrix: torch.dtype) -> Iterator[Planned]:
    """Every tensor of the file, read when its turn comes; shapes are torch's, GGUF counts dims the other way round."""
    config = weights.model
    heads, nope, latent = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank

    def one(name: str, released: str) -> Planned:
        shape = weights.shapes[released]
        dtype = torch.float32 if len(shape) == 1 or name.endswith(PRECISE) else matrix
        return Planned(name, dtype, shape, [partial(weights.values, released, dtype)])

    def kv_b(released: str) -> Tensor:
        """[H, N + V, C]"""
        return weights.values(released, matrix).unflatten(0, (heads, -1))

    def keys(released: str) -> Tensor:
        return kv_b(released)[:, :nope].transpose(1, 2)  # [H, C, N]

    def values(released: str) -> Tensor:
        return kv_b(released)[:, nope:]  # [H, V, C]

    for released, name in WHOLE.items():
        yield one(name, released)
    for layer in range(config.num_hidden_layers):
        block, there = f"model.layers.{layer}", f"blk.{layer}"
        for released, name in IN_BLOCK.items():
            if f"{block}.{released}" in weights.places:
                yield one(f"{there}.{name}", f"{block}.{released}")
        expansion = f"{block}.self_attn.kv_b_proj.weight"
        yield Planned(f"{there}.attn_k_b.weight", matrix, (heads, latent, nope), [partial(keys, expansion)])
        yield Planned(
            f"{there}.attn_v_b.weight", matrix, (heads, config.v_head_dim, latent), [partial(values, expansion)]
        )
        for kind, name in STACKS.items() if config.is_moe(layer) else ():
            experts = [f"{block}.mlp.experts.{e}.{kind}.weight" for e in range(config.n_routed_experts)]
            shape = (len(experts), *weights.shapes[experts[0]])
            yield Planned(f"{there}.{name}", matrix, shape, [partial(weights.values, e, matrix) for e in experts])
