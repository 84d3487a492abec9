"""Value embeddings in the words of a plain V3: what we train narrow, other tools read in wider matrices.

A V3 has one embedding and one stream. But E columns of the stream that no layer writes to, zero rows in all matrices
that write, keep what the embedding put there; if nothing but `kv_a_proj` reads them, zero columns elsewhere, and hands
them to E further columns of the latent, from where `kv_b_proj` gives a share of them to the values, then a token has
values of its own in every layer. That is `model.mla` with `value_embeddings`, D + E and C + E wide.

Three norms are passed on the way, and must not notice. So the columns come in very small, by a power of two, and only
the latent's norm makes them large again; the norms divide them by the root mean squares of stream and latent, which is
why `ops.elementwise.over_rms` does. And a mean over more columns of the same sum is smaller: what follows from that is
taken out of the norms' weights, of `rms_norm_eps`, and of the latent.

Nothing is learnt in these columns beyond the table, so that training computes a lookup and an addition instead.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.config import ModelConfig

SMALL = 2.0**-12  # of a sum of squares the square of it: less than FP32 can tell


def unfolded(config: ModelConfig) -> ModelConfig:
    """The plain V3 that says the same; a configuration without value embeddings is one already."""
    if not config.value_embeddings:
        return config
    width = config.hidden_size + config.value_width
    changes = {
        "value_embeddings": False,
        "hidden_size": width,
        "kv_lora_rank": config.latent_width,
        "rms_norm_eps": config.rms_norm_eps * config.hidden_size / width,
    }
    return config.model_copy(update=changes)


def widen(name: str, tensor: Tensor, config: ModelConfig, other: Callable[[str], Tensor]) -> Tensor:
    """A tensor of ours, or one of the matrices of a stack, as that V3 has it; `other` reads one more by its name."""
    d, e, c = config.hidden_size, config.value_width, config.kv_lora_rank
    stream, latent = math.sqrt(d / (d + e)), math.sqrt(c / (c + e))  # root mean squares there, of those here
    owner, _, what = name.removesuffix(".weight").rpartition(".")
    same = torch.eye(e)
    if what == "embed_tokens":
        return torch.cat((tensor, SMALL * other("embed_values.weight")), dim=1)
    if what == "kv_a_proj_with_mqa":
        down, key = tensor.split([c, config.qk_rope_head_dim])
        return torch.cat((torch.block_diag(down / latent, same), F.pad(key, (0, e))))
    if what == "kv_a_layernorm":
        return torch.cat((tensor * latent, torch.full((e,), 1 / SMALL)))
    if what == "kv_b_proj":
        share = other(f"{owner}.value_share") * same.unflatten(0, (config.num_attention_heads, -1))
        return torch.cat((tensor, F.pad(share, (0, 0, config.qk_nope_head_dim, 0)).flatten(0, 1)), dim=1)
    if what == "eh_proj":  # a module's own tokens bring their values along
        of_embedding, of_hidden = tensor.chunk(2, dim=1)
        return torch.cat((torch.block_diag(of_embedding, same), F.pad(of_hidden, (0, e, 0, e))), dim=1)
    if what in ("q_a_layernorm", "q_b_proj", "e_score_correction_bias"):
        return tensor
    if tensor.dim() == 1:  # the norms of the stream
        passes = what in ("input_layernorm", "enorm")
        return torch.cat((tensor * stream, torch.full((e,), stream if passes else 0.0)))
    writes = what in ("o_proj", "down_proj")
    return F.pad(tensor, (0, 0, 0, e) if writes else (0, e))
