"""What tokens bring to every layer, in the words of a plain V3: what we train narrow, others read in wider matrices.

A V3 has one embedding and one stream. But columns of the stream that no layer writes to, zero rows in all matrices that
write, keep what the embedding put there: D of them its own copy, E of them the values (`model.own`). The FFN reads the
copy by the same matrices as the stream. The values only `kv_a_proj` reads, zero columns elsewhere, and hands them to E
further columns of the latent, from where `kv_b_proj` gives a share of them to the heads.

The norms on the way must not notice. So the columns come in very small, by a power of two, and the last norm before
they are used makes them large again; the norms divide them by the root mean squares of stream and latent, which is why
training does. And a mean over more columns of the same sum is smaller: what follows from that is taken out of the
norms' weights, of `rms_norm_eps`, and of the latent.

Nothing is learnt in these columns beyond tables and shares, so that training computes lookups and additions instead.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.config import ModelConfig

SMALL = 2.0**-12  # of a sum of squares the square of it: less than FP32 can tell


def unfolded(config: ModelConfig) -> ModelConfig:
    """The plain V3 that says the same; a configuration whose tokens bring nothing is one already."""
    if not config.brings:
        return config
    width = sum(_columns(config))
    changes = {
        "embedding_shares": False,
        "value_embeddings": False,
        "hidden_size": width,
        "kv_lora_rank": config.latent_width,
        "rms_norm_eps": config.rms_norm_eps * config.hidden_size / width,
    }
    return config.model_copy(update=changes)


def _columns(config: ModelConfig) -> tuple[int, int, int]:
    """How many the stream has, the copy of the embedding, and the values."""
    d = config.hidden_size
    return d, d if config.embedding_shares else 0, config.value_width


def widen(name: str, tensor: Tensor, config: ModelConfig, other: Callable[[str], Tensor]) -> Tensor:
    """A tensor of ours, or one of the matrices of a stack, as that V3 has it; `other` reads one more by its name."""
    d, copy, e = _columns(config)
    stream = math.sqrt(d / (d + copy + e))  # root mean squares there, of those here
    latent = math.sqrt(config.kv_lora_rank / config.latent_width)
    owner, _, what = name.removesuffix(".weight").rpartition(".")
    if what == "embed_tokens":
        values = [SMALL * other("embed_values.weight")] if e else []
        return torch.cat((tensor, SMALL * tensor[:, :copy], *values), dim=1)
    if what == "kv_a_proj_with_mqa":
        down, key = tensor.split([config.kv_lora_rank, config.qk_rope_head_dim])
        down, key = (F.pad(part, (0, copy)) for part in (down / latent, key))
        return torch.cat((torch.block_diag(down, torch.eye(e)), F.pad(key, (0, e))))
    if what == "kv_a_layernorm":
        return torch.cat((tensor * latent, torch.full((e,), 1 / SMALL)))
    if what == "kv_b_proj":
        if not e:
            return tensor
        share = other(f"{owner}.value_share") * torch.eye(e).unflatten(0, (config.num_attention_heads, -1))
        return torch.cat((tensor, F.pad(share, (0, 0, config.qk_nope_head_dim, 0)).flatten(0, 1)), dim=1)
    if what == "eh_proj":  # a module's own tokens bring their values along
        of_embedding, of_hidden = (F.pad(part, (0, copy, 0, copy)) for part in tensor.chunk(2, dim=1))
        return torch.cat((torch.block_diag(of_embedding, torch.eye(e)), F.pad(of_hidden, (0, e, 0, e))), dim=1)
    if what in ("q_a_layernorm", "q_b_proj", "e_score_correction_bias"):
        return tensor
    if what in ("o_proj", "down_proj"):
        return F.pad(tensor, (0, 0, 0, copy + e))
    if tensor.dim() == 1:  # the norms of the stream
        reads_copy = copy and what == "post_attention_layernorm" and owner.startswith("layers.")
        share = other(f"{owner}.embedding_share") / SMALL if reads_copy else torch.zeros(1)
        passes = 1.0 if what in ("input_layernorm", "enorm") else 0.0
        return torch.cat((tensor, share * tensor[:copy], torch.full((e,), passes))) * stream
    # What reads the stream; in the FFN the copy by the same weights, elsewhere not at all.
    again = tensor[:, :copy] if ".mlp" in f".{owner}" else torch.zeros(len(tensor), copy)
    return torch.cat((tensor, again, torch.zeros(len(tensor), e)), dim=1)
