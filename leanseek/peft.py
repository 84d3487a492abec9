"""LoRA adapters for other tools: PEFT's layout, `adapter_config.json` and `adapter_model.safetensors`.

Beside an export of the base, PEFT and what builds on it (transformers, vLLM) load them as they are. A stack of experts
is one parameter there as here; its pairs lie in two matrices, A [E · r, in] and B [out, r · E], the expert's number
running slowest in the one and fastest in the other, and the wrapper of one stack stands around that of the other. The
adapters of MTP modules are under the names that released files have for those; transformers has no such modules and
passes them over.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from leanseek import checkpoint
from leanseek.config import BadInput, LoraConfig
from leanseek.hub import released_name
from leanseek.model.lora import A

FOLDER = "adapter"  # in the run's
# PEFT takes modules of these names for the routed experts of old; as parameters they are found in their own places.
FFN = ("gate_proj", "up_proj", "down_proj")
# Of the two stacks of experts the one whose wrapper is inside, then the one around it.
STACKS = {"gate_up_proj": "base_layer.", "down_proj": ""}


def write_adapter(run: Path, base: Path) -> Path:
    """RUN/adapter, of RUN's newest checkpoint; `base` is the run they were trained on. Raises BadInput, OSError."""
    weights = checkpoint.newest_weights(run)
    if weights.lora is None:
        raise BadInput(f"{run}: holds no adapters: they come of leanseek sft with lora.rank=…")
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    tensors = {_their_name(name): _their_shape(name, stored.read()) for name, stored in weights.adapters.items()}
    writing = folder / ".writing-adapter_model.safetensors"
    save_file(tensors, writing, {"format": "pt"})
    writing.replace(folder / "adapter_model.safetensors")
    described = adapter_config(weights.lora, str(base.absolute()))
    writing = folder / ".writing-adapter_config.json"
    writing.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    writing.replace(folder / "adapter_config.json")
    return folder


def adapter_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    """What PEFT must know: which matrices have adapters, of what rank, and how they are scaled."""
    ffn = [name for name in lora.modules if name in FFN]
    parameters = [f"{where}.{name}.weight" for where in ("mlp", "shared_experts") for name in ffn]
    parameters += [f"mlp.experts.{stack}" for stack in STACKS] if lora.experts else []
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name for name in lora.modules if name not in FFN],
        "target_parameters": parameters,
        "inference_mode": True,
    }


def _their_name(adapter: str) -> str:
    which = adapter[-len(A) :]
    name = released_name(adapter.removesuffix(which))
    module, _, stack = name.rpartition(".")
    if module.endswith(".experts"):
        name = f"{module}.{STACKS[stack]}".rstrip(".")
    return f"base_model.model.{name}{which}.weight"


def _their_shape(adapter: str, tensor: Tensor) -> Tensor:
    if tensor.ndim == 2:
        return tensor
    return tensor.flatten(0, 1) if adapter.endswith(A) else tensor.permute(1, 2, 0).flatten(1).contiguous()
