"""Released checkpoints scaled down, written from the specification of the files and not through `hub.py`.

Names and shapes are those of the releases: DeepSeek-V2-Lite in BF16, DeepSeek-V3 in FP8 with its MTP module, Kimi-K2.
Values have unit-scale activations; nothing here imports the code under test but the tokenizer.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.runs import tokenizer

COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

V2_LITE = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V3 = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8_CONFIG,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2 = V3 | {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
V2 = V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
MOONLIGHT = V3 | {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
del MOONLIGHT["quantization_config"]
PUBLISHED = {"V2-Lite": V2_LITE, "V2": V2, "V3": V3, "Kimi-K2": KIMI_K2, "Moonlight": MOONLIGHT}

# Blocks of 128 are cut off at both edges of most matrices.
SMALL = {
    "hidden_size": 160,
    "intermediate_size": 200,
    "moe_intermediate_size": 136,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 112,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 24,
    "v_head_dim": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}
SCALED: dict[str, dict[str, Any]] = {
    "V2-Lite": V2_LITE | SMALL,
    "V2": V2 | SMALL | {"q_lora_rank": 144, "n_group": 4, "topk_group": 2},
    "V3": V3 | SMALL | {"q_lora_rank": 144, "n_group": 4, "topk_group": 2},
    "V3.1": V3
    | SMALL
    | {
        "q_lora_rank": 144,
        "n_group": 4,
        "topk_group": 2,
        "quantization_config": FP8_CONFIG | {"scale_fmt": "ue8m0"},
    },
    "Kimi-K2": KIMI_K2 | SMALL | {"q_lora_rank": 144},
    "Moonlight": MOONLIGHT | SMALL,
}
SPARE_ROWS = 12


@dataclass
class Release:
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def write(self) -> None:
        """Shards in the order of the tensors, and their index."""
        for old in self.folder.glob("*.safetensors*"):
            old.unlink()
        names = list(self.tensors)
        half = len(names) // 2
        file_of = {}
        for number, part in enumerate((names[:half], names[half:]), start=1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: self.tensors[name] for name in part}, self.folder / file, metadata={"format": "pt"})
            file_of |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": sum(t.nbytes for t in self.tensors.values())}, "weight_map": file_of}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (self.folder / "config.json").write_text(json.dumps(self.config, indent=2))


def release(name: str, folder: Path, seed: int = 0) -> Release:
    """A release of SCALED at `folder`, tokenizer and the files that stand beside it included."""
    folder.mkdir(parents=True)
    vocabulary = tokenizer()
    config = SCALED[name] | {"vocab_size": vocabulary.vocab_size + SPARE_ROWS}
    made = Release(folder, config, values(config, seed))
    made.write()
    vocabulary.save(folder)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    told = json.loads((folder / "tokenizer_config.json").read_bytes()) | {"chat_template": template, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")  # not as we would write it
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "README.md").write_text("# A model\n")
    (folder / "configuration_deepseek.py").write_text("raise SystemExit('nobody runs this')\n")
    return made


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a release but the scales, by name, from the table of names and shapes."""
    d, vocabulary, heads = config["hidden_size"], config["vocab_size"], config["num_attention_heads"]
    nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent, query, moe = config["kv_lora_rank"], config["q_lora_rank"], config["moe_intermediate_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d)}

    def swiglu(prefix: str, width: int) -> None:
        for name in ("gate_proj", "up_proj"):
            found[f"{prefix}.{name}.weight"] = (width, d)
        found[f"{prefix}.down_proj.weight"] = (d, width)

    def block(prefix: str, dense: bool) -> None:
        attention = f"{prefix}.self_attn"
        if query is None:
            found[f"{attention}.q_proj.weight"] = (heads * (nope + rope), d)
        else:
            found[f"{attention}.q_a_proj.weight"] = (query, d)
            found[f"{attention}.q_a_layernorm.weight"] = (query,)
            found[f"{attention}.q_b_proj.weight"] = (heads * (nope + rope), query)
        found[f"{attention}.kv_a_proj_with_mqa.weight"] = (latent + rope, d)
        found[f"{attention}.kv_a_layernorm.weight"] = (latent,)
        found[f"{attention}.kv_b_proj.weight"] = (heads * (nope + v), latent)
        found[f"{attention}.o_proj.weight"] = (d, heads * v)
        if dense:
            swiglu(f"{prefix}.mlp", config["intermediate_size"])
        else:
            found[f"{prefix}.mlp.gate.weight"] = (config["n_routed_experts"], d)
            if config["topk_method"] == "noaux_tc":
                found[f"{prefix}.mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
            for expert in range(config["n_routed_experts"]):
                swiglu(f"{prefix}.mlp.experts.{expert}", moe)
            swiglu(f"{prefix}.mlp.shared_experts", moe * config["n_shared_experts"])
        found[f"{prefix}.input_layernorm.weight"] = (d,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (d,)

    layers = config["num_hidden_layers"]
    for layer in range(layers):
        block(f"model.layers.{layer}", dense=layer < config["first_k_dense_replace"])
    found["model.norm.weight"] = (d,)
    found["lm_head.weight"] = (vocabulary, d)
    for depth in range(config.get("num_nextn_predict_layers", 0)):
        module = f"model.layers.{layers + depth}"
        found[f"{module}.embed_tokens.weight"] = (vocabulary, d)
        found[f"{module}.enorm.weight"] = found[f"{module}.hnorm.weight"] = (d,)
        found[f"{module}.eh_proj.weight"] = (d, 2 * d)
        block(module, dense=False)
        found[f"{module}.shared_head.norm.weight"] = (d,)
        found[f"{module}.shared_head.head.weight"] = (vocabulary, d)
    return found


def in_fp8(name: str) -> bool:
    """Attention, dense FFN and experts; not the gate, the norms, the embedding, the head, `eh_proj`."""
    return (name.endswith("_proj.weight") and "eh_proj" not in name) or name.endswith("kv_a_proj_with_mqa.weight")


def values(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Released tensors: BF16, the bias FP32, and where the config says so FP8 with scales."""
    generator = torch.Generator().manual_seed(seed)
    quantization = config.get("quantization_config")
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes(config).items():
        normal = torch.empty(shape).normal_(generator=generator)
        if name.endswith("e_score_correction_bias"):
            tensors[name] = normal * 0.3 - 0.7  # FP32, and not to be rounded: every bit counts
        elif len(shape) == 1:
            tensors[name] = (1 + normal.clamp(-2, 2) / 4).bfloat16()
        elif name == "model.embed_tokens.weight":
            tensors[name] = normal.bfloat16()
        elif name.endswith("embed_tokens.weight"):  # the copies of an MTP module
            tensors[name] = tensors["model.embed_tokens.weight"].clone()
        elif name.endswith("shared_head.head.weight"):
            tensors[name] = tensors["lm_head.weight"].clone()
        else:
            gain = {"gate": 1.5, "q_proj": 2.0, "q_b_proj": 2.0}.get(name.split(".")[-2], 1.0)
            matrix = normal * gain * shape[1] ** -0.5
            if quantization and in_fp8(name):  # scales of masters that nobody sees: rounded values give others
                codes, scales = quantised(matrix, quantization.get("scale_fmt") == "ue8m0")
                tensors[name], tensors[name.replace(".weight", ".weight_scale_inv")] = codes, scales
            else:
                tensors[name] = matrix.bfloat16()
    return tensors


def quantised(matrix: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """One block after the other, as the documentation of the format has it: scale = max |block| / 448."""
    rows, columns = matrix.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(math.ceil(rows / 128), math.ceil(columns / 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            scale = matrix[where].abs().max().item() / 448
            if power_of_two:
                scale = 2.0 ** math.ceil(math.log2(scale))
            scales[i, j] = scale
            codes[where] = (matrix[where] / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released tensors in FP32: code times the scale of its block, one block after the other."""
    found = {}
    for name, tensor in tensors.items():
        scales = tensors.get(name.replace(".weight", ".weight_scale_inv"))
        if name.endswith("_scale_inv"):
            continue
        found[name] = tensor.float()
        if scales is not None and tensor.dtype == torch.float8_e4m3fn:
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    found[name][128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scales[i, j].float()
    return found


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a folder, by the safetensors package."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = load_file(file)
        assert not tensors.keys() & content.keys()
        tensors |= content
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    assert set(index) == set(tensors)
    return tensors


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are in one only, or are not the same to the bit."""
    return sorted(
        name
        for name in a.keys() | b.keys()
        if name not in a
        or name not in b
        or a[name].dtype != b[name].dtype
        or a[name].shape != b[name].shape
        or not torch.equal(
            a[name].contiguous().view(-1).view(torch.uint8), b[name].contiguous().view(-1).view(torch.uint8)
        )
    )
