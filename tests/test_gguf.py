"""The GGUF file, read by the gguf package: every weight, number and token in its place. llama.cpp itself: scripts/."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

import leanseek.hub as hub
from leanseek.config import BadInput
from leanseek.data.tokenizer import SPLITS, Tokenizer
from leanseek.gguf import export_gguf
from tests.releases import Release, plain, release

FAMILIES = ["V2-Lite", "V3", "Kimi-K2"]


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, Path]:
    """A family, imported and written as GGUF in FP32."""
    folder = tmp_path_factory.mktemp("gguf")
    made = release(request.param, folder / "release")
    hub.import_release(made.folder, folder / "run")
    export_gguf(folder / "run", folder / "out", "fp32")
    return made, folder / "out" / "model-fp32.gguf"


def tensors_of(reader: GGUFReader) -> dict[str, Tensor]:
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


def in_released_spelling(found: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Back to released names and shapes, by what llama.cpp's model file says of each tensor."""
    heads = config["num_attention_heads"]
    released = {
        "model.embed_tokens.weight": found.pop("token_embd.weight"),
        "model.norm.weight": found.pop("output_norm.weight"),
        "lm_head.weight": found.pop("output.weight"),
    }
    plain_names = {
        "attn_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "attn_q.weight": "self_attn.q_proj.weight",
        "attn_q_a.weight": "self_attn.q_a_proj.weight",
        "attn_q_b.weight": "self_attn.q_b_proj.weight",
        "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
        "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
        "attn_output.weight": "self_attn.o_proj.weight",
        "ffn_gate_inp.weight": "mlp.gate.weight",
        "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
        **{f"ffn_{kind}.weight": f"mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")},
        **{f"ffn_{kind}_shexp.weight": f"mlp.shared_experts.{kind}_proj.weight" for kind in ("gate", "up", "down")},
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        keys, values = found.pop(f"blk.{layer}.attn_k_b.weight"), found.pop(f"blk.{layer}.attn_v_b.weight")
        assert keys.shape == (heads, config["kv_lora_rank"], config["qk_nope_head_dim"])
        assert values.shape == (heads, config["v_head_dim"], config["kv_lora_rank"])
        by_head = [torch.cat((keys[h].T, values[h])) for h in range(heads)]
        released[f"{block}.self_attn.kv_b_proj.weight"] = torch.cat(by_head)
        for kind in ("gate", "up", "down"):
            stack = found.pop(f"blk.{layer}.ffn_{kind}_exps.weight", None)
            for expert, matrix in enumerate(() if stack is None else stack):
                released[f"{block}.mlp.experts.{expert}.{kind}_proj.weight"] = matrix
        for theirs, name in plain_names.items():
            if f"blk.{layer}.{theirs}" in found:
                released[f"{block}.{name}"] = found.pop(f"blk.{layer}.{theirs}")
    assert not found
    return released


def test_every_weight_of_the_main_model_is_there_and_no_other(exported: tuple[Release, Path]) -> None:
    made, file = exported
    layers = made.config["num_hidden_layers"]
    expected = {n: t for n, t in plain(made.tensors).items() if not n.startswith(f"model.layers.{layers}.")}
    found = in_released_spelling(tensors_of(GGUFReader(file)), made.config)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_the_numbers_are_the_configs(exported: tuple[Release, Path]) -> None:
    made, file = exported
    config, reader = made.config, GGUFReader(file)
    told = {name.removeprefix("deepseek2."): field.contents() for name, field in reader.fields.items()}
    assert told["general.architecture"] == "deepseek2"
    pairs = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "vocab_size": "vocab_size",
        "attention.head_count": "num_attention_heads",
        "attention.kv_lora_rank": "kv_lora_rank",
        "attention.value_length_mla": "v_head_dim",
        "leading_dense_block_count": "first_k_dense_replace",
        "expert_count": "n_routed_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_shared_count": "n_shared_experts",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_weights_norm": "norm_topk_prob",
        "rope.dimension_count": "qk_rope_head_dim",
        "tokenizer.ggml.bos_token_id": "bos_token_id",
        "tokenizer.ggml.eos_token_id": "eos_token_id",
    }
    assert {key: told[key] for key in pairs} == {key: config[name] for key, name in pairs.items()}
    assert told["attention.head_count_kv"] == 1
    assert told["attention.key_length"] == config["kv_lora_rank"] + config["qk_rope_head_dim"]
    assert told["attention.key_length_mla"] == config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    assert told["attention.q_lora_rank"] == (config["q_lora_rank"] or 0)
    assert told["expert_gating_func"] == {"softmax": 1, "sigmoid": 2}[config["scoring_func"]]
    assert told["expert_weights_scale"] == pytest.approx(config["routed_scaling_factor"])
    assert told["rope.freq_base"] == config["rope_theta"]
    assert told["rope.scaling.type"] == "yarn"
    assert told["rope.scaling.factor"] == config["rope_scaling"]["factor"]
    assert told["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1 * config["rope_scaling"]["mscale_all_dim"])
    assert told["rope.scaling.yarn_beta_fast"] == config["rope_scaling"]["beta_fast"]
    groups = (told.get("expert_group_count"), told.get("expert_group_used_count"))
    assert groups == ((config["n_group"], config["topk_group"]) if config["n_group"] > 1 else (None, None))


def test_the_tokenizer_travels(exported: tuple[Release, Path]) -> None:
    made, file = exported
    told = {name: field.contents() for name, field in GGUFReader(file).fields.items() if name.startswith("tokenizer")}
    tokenizer = Tokenizer.load(made.folder)
    tree = json.loads((made.folder / "tokenizer.json").read_bytes())
    tokens, kinds = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"]
    assert len(tokens) == made.config["vocab_size"]
    assert len(set(tokens)) == len(tokens)
    assert {token: tokens.index(token) for token in tree["model"]["vocab"]} == tree["model"]["vocab"]
    assert {tokens[n]: n for n, kind in enumerate(kinds) if kind == 3} == tokenizer.special
    assert [kind for kind in kinds if kind == 5] == [5] * (made.config["vocab_size"] - tokenizer.vocab_size)
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"]]
    assert told["tokenizer.ggml.merges"] == pairs
    assert (told["tokenizer.ggml.model"], told["tokenizer.ggml.pre"]) == ("gpt2", "deepseek-v3")
    assert told["tokenizer.chat_template"] == tokenizer.chat_template


def test_matrices_are_bf16_where_asked_and_routers_never(tmp_path: Path) -> None:
    made = release("V3", tmp_path / "release")
    hub.import_release(made.folder, tmp_path / "run")
    export_gguf(tmp_path / "run", tmp_path / "out")
    reader = GGUFReader(tmp_path / "out" / "model-bf16.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    precise = {name for name, kind in kinds.items() if kind == "F32"}
    assert {name.split(".", 2)[-1] for name in precise if name.startswith("blk.")} == {
        *(f"{name}.weight" for name in ("attn_norm", "attn_q_a_norm", "attn_kv_a_norm", "ffn_norm", "ffn_gate_inp")),
        "exp_probs_b.bias",
    }
    assert {kinds[name] for name in kinds.keys() - precise} == {"BF16"}
    (stack,) = (tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    values = torch.from_numpy(stack.data.copy()).view(torch.bfloat16)
    assert torch.equal(values[3], plain(made.tensors)["model.layers.1.mlp.experts.3.down_proj.weight"].bfloat16())


def test_a_tokenizer_without_a_name_there_is_refused(tmp_path: Path) -> None:
    made = release("V3", tmp_path / "release")
    file = made.folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace(r"\\p{N}{1,3}", r"\\p{N}"), encoding="utf-8")
    assert Tokenizer.load(made.folder).splits != SPLITS
    hub.import_release(made.folder, tmp_path / "run")
    with pytest.raises(BadInput, match="splits text in a way that llama"):
        export_gguf(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_groups_that_it_cannot_choose_by_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = release("V2", tmp_path / "release")
    hub.import_release(made.folder, tmp_path / "run")
    export_gguf(tmp_path / "run", tmp_path / "out")
    assert "will choose among all experts" in capsys.readouterr().err
    fields = GGUFReader(tmp_path / "out" / "model-bf16.gguf").fields
    assert not [name for name in fields if "group" in name]
