"""The peer: transformers' DeepseekV3ForCausalLM at the shapes of one of our configurations."""

import importlib
from typing import Any

import torch
from torch import Tensor

from leanseek.config import BadInput, ModelConfig
from leanseek.hub import released_name
from leanseek.model.transformer import Transformer

EXPERTS = ("grouped_mm", "batched_mm", "eager")  # its ways to compute the experts


def transformers_model(config: ModelConfig, experts: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model with random weights, computing its experts that way. Raises BadInput without transformers."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise BadInput("the peer of this measurement is transformers: pip install 'leanseek[oracle]'") from None
    transformers.utils.logging.set_verbosity_error()
    fields = config.model_dump(exclude={"verbatim", "num_key_value_heads", "topk_method", "moe_layer_freq"})
    theirs = transformers.DeepseekV3Config(**fields, num_key_value_heads=config.num_attention_heads)
    theirs._experts_implementation = experts
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM(theirs).to(dtype)


def same_weights(model: Transformer, experts: str, dtype: torch.dtype) -> Any:
    """transformers' model with the weights of ours, its MTP module's left out as transformers leaves them out."""
    theirs = transformers_model(model.config, experts)
    named = {released_name(name): tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}
    theirs.load_state_dict(named, strict=True)
    return theirs.to(dtype)


class TheirStep:
    """A training step as its users write it: AdamW, clipping, labels shifted inside."""

    def __init__(self, config: ModelConfig, experts: str, precision: str, compiled: bool = False) -> None:
        """precision: fp32, bf16 for weights too, or autocast: FP32 weights, BF16 matmuls."""
        self.model = transformers_model(config, experts, torch.bfloat16 if precision == "bf16" else torch.float32)
        self.model.train()
        self.autocast = precision == "autocast"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
        self.run = torch.compile(self.model) if compiled else self.model

    def __call__(self, ids: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
