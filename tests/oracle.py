"""The same model twice: ours and transformers' own, with the same weights, and how far apart they are.

Weights at initialisation scale prove nothing: attention is flat and logits are near zero, so that almost any fault
stays below the tolerance. Everything here has activations of unit scale, attention that chooses, and norms that differ.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from leanseek.config import ModelConfig
from leanseek.model.layers import RMSNorm
from leanseek.model.moe import Experts, Router
from leanseek.model.transformer import SHARES, Transformer

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    routed_scaling_factor=2.5,
    max_position_embeddings=256,
)


def tiny(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate(TINY.model_dump() | changes)


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random weights that keep activations at unit scale; biases that make many a selected score negative."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.empty(tensor.shape, dtype=torch.float64).normal_(mean, std, generator=generator))

    with torch.no_grad():
        for name, module in model.named_modules():
            for share in SHARES:
                if isinstance(getattr(module, share, None), nn.Parameter):
                    normal(getattr(module, share), 0.3, mean=1.0)
            if isinstance(module, RMSNorm):
                uniform = torch.empty(module.weight.shape, dtype=torch.float64).uniform_(0.5, 1.5, generator=generator)
                module.weight.copy_(uniform)
            elif isinstance(module, nn.Embedding):
                normal(module.weight, 1.0)
            elif isinstance(module, Experts):
                normal(module.gate_up_proj, module.gate_up_proj.shape[2] ** -0.5)
                normal(module.down_proj, 2 * module.down_proj.shape[2] ** -0.5)
            elif isinstance(module, Router):
                normal(module.weight, 1.5 * module.weight.shape[1] ** -0.5)
                if module.e_score_correction_bias is not None:
                    normal(module.e_score_correction_bias, 0.3, mean=-0.7)
            elif isinstance(getattr(module, "weight", None), nn.Parameter):
                gain = 2.0 if name.endswith(("q_proj", "q_b_proj")) else 1.0
                normal(module.weight, gain * module.weight.shape[1] ** -0.5)


def ours(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Our model in training mode; with dtype FP64 the weights too."""
    model = Transformer(config, dtype)
    if dtype == torch.float64:
        model.double()
    fill(model, seed)
    return model


def theirs(config: ModelConfig) -> Any:
    """transformers' model of the same shape: plain attention, and experts as a loop."""
    names = set(ModelConfig.model_fields) - {"model_type", "verbatim", "rope_theta", "rope_scaling", "moe_layer_freq"}
    values = {name: getattr(config, name) for name in names - {"scoring_func", "topk_method", "hidden_act"}}
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= config.rope_scaling.model_dump() | {"rope_type": "yarn"}
        del rope["type"]
    released: Any
    kind: Any
    if config.model_type == "deepseek_v3":
        released, kind = DeepseekV3Config(**values, rope_parameters=rope), DeepseekV3ForCausalLM
    else:
        released = DeepseekV2Config(**values, rope_parameters=rope, topk_method=config.topk_method)
        kind = DeepseekV2ForCausalLM
    released._attn_implementation = "eager"
    released._experts_implementation = "eager"
    return kind(released)


def their_name(name: str) -> str:
    """Our main model's names are theirs under `model.`; the head stands beside it."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def same_weights(model: Transformer) -> Any:
    """transformers' model with the weights of ours, every one of them."""
    oracle = theirs(model.config)
    main = {their_name(name): tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}
    oracle.load_state_dict(main, strict=True)
    return oracle


def their_mtp_name(name: str, layers: int) -> str:
    """`mtp.<layers + k>.block.…` is `layers.<k>.mtp_block.…` there, and the final norm `post_norm`."""
    _, index, rest = name.split(".", 2)
    if rest.startswith("block."):
        rest = "mtp_" + rest
    elif rest.startswith("norm."):
        rest = "post_" + rest
    return f"layers.{int(index) - layers}.{rest}"


def same_mtp(model: Transformer, oracle: Any) -> Any:
    """transformers' MTP modules with the weights of ours, embedding and head being those of `oracle`."""
    modules = MtpModel(oracle, model.config.num_nextn_predict_layers)
    further = {
        their_mtp_name(name, model.config.num_hidden_layers): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("mtp.")
    }
    missing, unexpected = modules.load_state_dict(further, strict=False)
    assert not unexpected
    assert all(name.startswith(("embed_tokens.", "shared_head.")) for name in missing)
    return modules


def sample(config: ModelConfig, batch: int = 2, tokens: int = 24, start: int = 0) -> tuple[Tensor, Tensor]:
    """ids and positions [B, T]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (batch, tokens), generator=generator)
    return ids, torch.arange(start, start + tokens).expand(batch, -1)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def differences(model: Any, oracle: Any, ids: Tensor, positions: Tensor) -> dict[str, float]:
    """By name, how far logits and the gradient of every parameter are apart, relative to their scale."""
    with chosen_scores(oracle) as chosen:
        out = oracle(input_ids=ids, position_ids=positions, use_cache=False, output_attentions=True)
    _has_teeth(out.logits, out.attentions, chosen, model.config)
    cotangent = torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(2))
    oracle.zero_grad()
    model.zero_grad()
    (out.logits * cotangent).sum().backward()
    assert model.training
    assert model.lm_head is not None
    logits = model.lm_head(model(ids, positions))
    (logits * cotangent).sum().backward()
    found = {"logits": distance(logits, out.logits)}
    their_parameters = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("mtp."):
            expected = their_parameters.pop(their_name(name)).grad
            assert expected is not None
            assert expected.abs().max() > 1e-3, f"{name} has no gradient to speak of"
            found[name] = distance(torch.zeros_like(expected) if parameter.grad is None else parameter.grad, expected)
    assert not their_parameters
    return found


@contextmanager
def chosen_scores(oracle: Any) -> Iterator[list[Tensor]]:
    """Collects the biased scores of the experts that transformers' V3 routers choose."""
    chosen: list[Tensor] = []

    def watch(router: Any, args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _, experts = output
        chosen.append((logits.sigmoid() + router.e_score_correction_bias).gather(1, experts).detach())

    hooks = [
        module.register_forward_hook(watch) for module in oracle.modules() if hasattr(module, "e_score_correction_bias")
    ]
    yield chosen
    for hook in hooks:
        hook.remove()


def _has_teeth(logits: Tensor, attentions: tuple[Tensor, ...], chosen: list[Tensor], config: ModelConfig) -> None:
    """The comparison is worth something: logits of order one, attention that is not flat, negative scores chosen."""
    assert 0.5 < logits.std() < 5
    tokens = logits.shape[1]
    flat = sum(math.log(t + 1) for t in range(tokens)) / tokens  # entropy in nats of looking at everything alike
    for weights in attentions:
        entropy = -torch.special.xlogy(weights, weights).sum(dim=-1).mean().item()
        assert 0.1 * flat < entropy < 0.8 * flat
    if config.model_type == "deepseek_v3" and chosen:
        scores = torch.cat(chosen)
        assert (scores < 0).any()
        assert (scores > 0).any()
