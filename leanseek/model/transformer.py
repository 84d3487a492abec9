"""The whole model (report §2): a pre-norm decoder of MLA and DeepSeekMoE blocks, with MTP modules beside it.

B batch · T tokens in a row · D hidden_size · V vocab_size. The model is one-device code: it knows no ranks, no files
and no environment. Layers are kept by global index and embedding, norm and head may be absent, so that a pipeline can
cut it.
"""

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from leanseek.config import ModelConfig
from leanseek.model.block import Block
from leanseek.model.layers import Linear, RMSNorm
from leanseek.model.mla import LatentCache
from leanseek.model.moe import Experts, LocalDispatcher, Router
from leanseek.model.mtp import MTPModule
from leanseek.model.own import NOTHING, Own
from leanseek.model.rope import rotary
from leanseek.ops.backend import PLAIN, Kernels
from leanseek.ops.precision import Plain

SHARES = {"embedding_share": 0.0, "value_share": 2.0}
OUTPUTS = re.compile(r"(^lm_head|\.o_proj|\.down_proj)(\.weight)?$")


class Transformer(nn.Module):
    """`dtype` is the precision of the activations; the parameters keep their own."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.kernels = PLAIN
        self.awake: int | None = None  # layers from the first that compute; None: all. Those above pass the stream on
        n = config.num_hidden_layers
        self.embed_tokens: nn.Embedding | None = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_values: nn.Embedding | None = None
        if config.value_embeddings:
            self.embed_values = nn.Embedding(config.vocab_size, config.value_width)
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(n)})
        self.norm: RMSNorm | None = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: Linear | None = Linear(config.hidden_size, config.vocab_size)
        further = range(n, n + config.num_nextn_predict_layers)  # released files number MTP modules on from the layers
        self.mtp = nn.ModuleDict({str(i): MTPModule(config, i) for i in further})

    def use(self, kernels: Kernels) -> None:
        """From now on its layers, its loss and a runner of it compute with these."""
        self.kernels = kernels
        for module in self.modules():
            if isinstance(module, Experts):
                module.precision = Plain(kernels)
                if isinstance(module.dispatcher, LocalDispatcher):
                    module.dispatcher.kernels = kernels

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        segments: Tensor | None = None,
        cache: Sequence[LatentCache] | None = None,
    ) -> Tensor:
        """ids, positions [B, T] (for ids, hidden states [B, T, D] of earlier layers) → final hidden states [B, T, D].

        segments [B, T] isolates the samples packed into a row. With a cache, one LatentCache per layer, the new tokens
        attend to every cached position up to their own. The head is apart: `lm_head`.
        """
        rope, mask = rotary(positions, self.config), attention_mask(positions, segments, cached=cache is not None)
        hidden, own = ids, NOTHING
        if not ids.is_floating_point():
            assert self.embed_tokens is not None
            hidden = self.embed_tokens(ids).to(self.dtype)
            own = self.own(ids, hidden)
        for index, layer in self.layers.items():
            if self.awake is not None and int(index) >= self.awake:
                break
            hidden = layer(hidden, rope, mask, None if cache is None else cache[int(index)], own)
        return hidden if self.norm is None else self.norm(hidden)

    def predict_further(
        self,
        hidden: Tensor,
        ids: Tensor | Sequence[Tensor],
        positions: Tensor,
        segments: Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> list[Tensor]:
        """The MTP modules in training: hidden [B, T, D] and ids [B, T] of a row → for depth k = 1, 2, … [B, T − k, D].

        Position i of depth k predicts token i + k + 1 of the row. Of a row that is cut, `ids` are for each depth those
        of the tokens k places on, [B, ≤ T], and `cache` knows the other pieces.
        """
        if not self.mtp:
            return []
        assert self.embed_tokens is not None
        following = [ids[:, k:] for k in range(1, len(self.mtp) + 1)] if isinstance(ids, Tensor) else ids
        further = []
        for module, tokens in zip(self.mtp.values(), following, strict=True):
            kept = tokens.shape[1]
            where = positions[:, :kept]
            mask = attention_mask(where, None if segments is None else segments[:, :kept], cached=cache is not None)
            embedded = self.embed_tokens(tokens).to(self.dtype)
            own = self.own(tokens, embedded)
            hidden = module(embedded, hidden[:, :kept], rotary(where, self.config), mask, cache, own)
            further.append(hidden)
        return further

    def remember(self, hidden: Tensor, ids: Tensor, positions: Tensor, cache: LatentCache) -> None:
        """What the first MTP module keeps of a prompt, so that it can draft behind it (report §5.4.3).

        hidden [B, T, D] of the tokens at positions [B, T], and the ids [B, T] of those that follow them.
        """
        assert self.embed_tokens is not None
        embedded, module = self.embed_tokens(ids).to(self.dtype), next(iter(self.mtp.values()))
        assert isinstance(module, MTPModule)
        own = self.own(ids, embedded)
        module.remember(embedded, hidden, rotary(positions, self.config), cache, own)

    def own(self, ids: Tensor, embedded: Tensor) -> Own:
        """What tokens ids [B, T], looked up as embedded [B, T, D], bring to every layer."""
        values = None if self.embed_values is None else self.embed_values(ids).to(self.dtype)
        return Own(embedded if self.config.embedding_shares else None, values)

    def routers(self) -> dict[str, Router]:
        """Every router by name, those of the MTP modules included."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Router)}

    def beginning(
        self,
        std: float,
        generator: torch.Generator | None,
        embedding_std: float | None = None,
        zero_outputs: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """What each parameter begins with, by name, one at a time: matrices from N(0, std²) (report §4.2), norms one.

        Embeddings may have a deviation of their own, and what tokens bring begins with SHARES; with `zero_outputs` what
        writes into the residual stream, and the head, begin at zero. The model itself may have no memory (device
        "meta"). Without a generator matrices hold anything.
        """
        for name, module in self.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                whole = f"{name}.{own}"
                if isinstance(module, RMSNorm):
                    value.fill_(1.0)
                elif own in SHARES:
                    value.fill_(SHARES[own])
                elif zero_outputs and OUTPUTS.search(whole):
                    value.zero_()
                elif generator is not None:
                    own_std = embedding_std if isinstance(module, nn.Embedding) else None
                    value.normal_(0.0, std if own_std is None else own_std, generator=generator)
                yield whole, value

    @torch.no_grad()
    def initialise(
        self,
        std: float,
        generator: torch.Generator,
        embedding_std: float | None = None,
        zero_outputs: bool = False,
    ) -> None:
        """Gives parameters what they begin with, and biases and counters zero; emptied models too."""
        for name, value in self.beginning(std, generator, embedding_std, zero_outputs):
            self.get_parameter(name).copy_(value)
        for buffer in self.buffers():
            buffer.zero_()


def attention_mask(positions: Tensor, segments: Tensor | None, cached: bool) -> Tensor | None:
    """Who may attend to whom, bool [B, 1, T, S]; None where plain causal attention says it all.

    With a cache, key j is the token at position j, so the keys reach to the largest position asked for.
    """
    if cached:
        if segments is not None:
            raise ValueError("segments isolate packed training rows; a cache holds one sample per row")
        keys = torch.arange(int(positions.max()) + 1, device=positions.device)
        if len(keys) == positions.shape[1] and bool((positions == keys).all()):
            return None  # nothing came before
        return keys <= positions[:, None, :, None]
    if segments is None:
        return None
    causal = torch.ones(positions.shape[1], positions.shape[1], dtype=torch.bool, device=positions.device).tril()
    return causal & (segments[:, None, :, None] == segments[:, None, None, :])
