"""Beginning with a circuit that looks things up, where chance would take millions of tokens to find one.

A language model learns early to say again what followed the same token before, and it needs two attention layers for
it: a head of the first writes into each position which token came just before, a head of the second looks for the
positions whose "just before" is the current token, and says what stands there (Olsson et al., "In-context learning and
induction heads", find the pair in every model they train). Its weights can be written down. Everything else begins at
random as ever (report §4.2), and training goes on from there; nothing about the architecture is special.

D width · C kv_lora_rank · N qk_nope_head_dim · m, n widths of the two codes. The residual stream is divided at first:
one direction that all embeddings share, m directions for "the token before", n for "to be said", the rest for the
embeddings themselves.
"""

import math

import torch
from torch import Tensor

from leanseek.config import ModelConfig
from leanseek.model.mla import MLA
from leanseek.model.rope import rope_frequencies
from leanseek.model.transformer import Transformer

SHARED = 0.5  # length of the direction that all embeddings share; their own part has length 1
BEFORE, FOUND = 0.7, 0.75  # lengths at which the token before, and the token found, are written
SHARPNESS = 6.0  # nats of attention by which the position before leads the ones next to it
MATCH = 20.0  # nats of attention for a position whose token before is the current one
SAID = 8.0  # nats by which the token found is likelier
PAIRS = 5  # of RoPE that tell one position from the next


@torch.no_grad()
def begin_with_induction(model: Transformer, std: float, generator: torch.Generator) -> None:
    """Writes the circuit into head 0 of the first two layers, the embedding and the output head.

    The model has just been initialised with `std`; its configuration has room for the codes (`Config` checks that).
    """
    config, width = model.config, model.config.hidden_size
    assert model.embed_tokens is not None
    assert model.lm_head is not None
    m, n = config.induction_widths
    shared, before, found, own = _orthonormal(width, width, generator).split([1, m, n, width - 1 - m - n])  # rows
    embedding = torch.randn(config.vocab_size, len(own), generator=generator) / math.sqrt(len(own)) @ own
    model.embed_tokens.weight.copy_(embedding + SHARED * shared)
    to_match = _orthonormal(len(own), m, generator) @ own  # [m, D] a token's code for being matched
    to_say = _orthonormal(len(own), n, generator) @ own  # [n, D] and for being said
    first, second = [module for module in model.layers.modules() if isinstance(module, MLA)][:2]

    # The norm in front of a layer stretches the stream, of this length so far, to √D.
    stretch = math.sqrt(width / (1 + SHARED**2))
    code = stretch * math.sqrt(m / len(own))
    first.kv_a_proj_with_mqa.weight[:m] = to_match
    latent = math.sqrt(config.kv_lora_rank / (code**2 + (config.kv_lora_rank - m) * std**2 * width))
    _look_at_the_one_before(first, config, shared[0], SHARED * stretch, std)
    _write(first, slice(0, m), BEFORE / (code * latent) * before)

    stretch = math.sqrt(width / (1 + SHARED**2 + BEFORE**2))
    key, value = stretch * BEFORE, stretch * math.sqrt(n / len(own))
    second.kv_a_proj_with_mqa.weight[: m + n] = torch.cat((before, to_say))
    second.kv_a_proj_with_mqa.weight[m + n : config.kv_lora_rank] = 0
    latent = math.sqrt(config.kv_lora_rank) / math.hypot(key, value)
    _look_for_the_same(second, config, to_match, stretch * math.sqrt(m / len(own)), key * latent, std)
    _write(second, slice(m, m + n), FOUND / (value * latent) * found)

    stretch = math.sqrt(width / (1 + SHARED**2 + BEFORE**2 + FOUND**2))
    codes = embedding @ to_say.T  # [V, n]
    codes /= codes.norm(dim=1, keepdim=True)
    model.lm_head.weight.copy_(SAID / (stretch * FOUND) * codes @ found)


def _look_at_the_one_before(layer: MLA, config: ModelConfig, shared: Tensor, length: float, std: float) -> None:
    """Query and rotary key of head 0 as constants, read off the shared direction, that agree best one position apart.

    `length` is that of the direction in the layer's input.
    """
    angles = rope_frequencies(config)[:PAIRS]
    strength = SHARPNESS / (layer.scale * sum(1 - math.cos(angle) for angle in angles))
    wanted = torch.zeros(config.qk_rope_head_dim)  # the constant key (1, 0) of a pair, seen from one position on
    layer.kv_a_proj_with_mqa.weight[config.kv_lora_rank :] = 0
    for j, angle in enumerate(angles):
        layer.kv_a_proj_with_mqa.weight[config.kv_lora_rank + 2 * j] = shared / length
        wanted[2 * j], wanted[2 * j + 1] = strength * math.cos(angle), -strength * math.sin(angle)
    query, key_and_value = _head(layer)
    query.zero_()
    key_and_value.zero_()
    if config.q_lora_rank is None:
        query[config.qk_nope_head_dim :] = torch.outer(wanted / length, shared)
        return
    layer.q_a_proj.weight[0] = shared
    others = (config.q_lora_rank - 1) * std**2 * config.hidden_size
    query[config.qk_nope_head_dim :, 0] = wanted / (length * math.sqrt(config.q_lora_rank / (length**2 + others)))


def _look_for_the_same(
    layer: MLA, config: ModelConfig, to_match: Tensor, length: float, key_length: float, std: float
) -> None:
    """Query of head 0: the current token's code, `length` long in the input; key: the first values of the latent."""
    m = len(to_match)
    query, key_and_value = _head(layer)
    query.zero_()
    key_and_value.zero_()
    key_and_value[:m, :m] = torch.eye(m)
    layer.kv_a_proj_with_mqa.weight[config.kv_lora_rank :] = 0  # no position is nearer than another
    if config.q_lora_rank is None:
        query[:m] = MATCH / (layer.scale * length * key_length) * to_match
        return
    layer.q_a_proj.weight[:m] = to_match
    others = (config.q_lora_rank - m) * std**2 * config.hidden_size
    length *= math.sqrt(config.q_lora_rank / (length**2 + others))
    query[:m, :m] = MATCH / (layer.scale * length * key_length) * torch.eye(m)


def _write(layer: MLA, values: slice, directions: Tensor) -> None:
    """Head 0 passes these values of the latent on into `directions` [k, D] of the residual stream."""
    _, key_and_value = _head(layer)
    k = len(directions)
    key_and_value[layer.qk_nope_head_dim :][:k, values] = torch.eye(k)
    output = layer.o_proj.weight.unflatten(1, (layer.heads, -1))[:, 0]  # [D, V]
    output.zero_()
    output[:, :k] = directions.T


def _head(layer: MLA) -> tuple[Tensor, Tensor]:
    """Views of head 0's weights: of its query [N + R, q_lora_rank or D], and of its key and value [N + V, C]."""
    query = (layer.q_b_proj if layer.compresses_queries else layer.q_proj).weight.unflatten(0, (layer.heads, -1))
    return query[0], layer.kv_b_proj.weight.unflatten(0, (layer.heads, -1))[0]


def _orthonormal(width: int, rows: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows [rows, width]."""
    return torch.linalg.qr(torch.randn(width, rows, generator=generator))[0].T
