"""One decoding step of all rows: the model's arithmetic, repacked so that little but arithmetic is left.

A token's step is a few dozen products of a small vector with a matrix, and on a CPU most of its time goes into calling
operations, not into them. So matrices that read the same vector are joined, products of small matrices are worked out
before, each matrix rests in the layout in which it is multiplied fastest, and between them everything is FP32, without
casts. `model.transformer.Transformer` over the same cache is the slow twin that it must agree with.

B rows · T new tokens of each, drafts behind the newest · S tokens of the longest row · D hidden_size · H heads · N, R,
V widths of a head · C latent_width, what is kept beside the rotary key · E experts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.model.block import Block
from leanseek.model.layers import RMSNorm, SwiGLU
from leanseek.model.mla import MLA
from leanseek.model.moe import MoE
from leanseek.model.mtp import MTPModule
from leanseek.model.rope import rotary
from leanseek.model.transformer import Transformer
from leanseek.parallel.mesh import ALONE, Ranks
from leanseek.serve.cache import Cache, Places

# Elements of a matrix up to which calls cost more than bytes: products are taken ahead, BF16 is widened.
SMALL = 1 << 19
WIDE_ROWS = 256  # rows up to which every expert may do every token rather than having the tokens sorted,
WIDE_WORK = 1 << 30  # and multiplications for which that is quicker
WIDE_LAYER = 1 << 26  # elements of a layer's experts that may be kept a second time, in the order which that needs


class Runner:
    """Steps `model` without changing it. It copies weights: make a new one when they have changed."""

    def __init__(self, model: Transformer, ranks: Ranks = ALONE) -> None:
        assert model.embed_tokens is not None
        assert model.norm is not None
        assert model.lm_head is not None
        self.embedding = model.embed_tokens.weight.detach()
        self.values = None if model.embed_values is None else model.embed_values.weight.detach()
        self.dtype = between(self.embedding.device, model.dtype)  # of activations, and of the cache
        self.latent_decode = decode = model.kernels.latent_decode
        blocks = [block for block in model.layers.values() if isinstance(block, Block)]
        self.layers = [_Layer(block, model.dtype, ranks, decode) for block in blocks]
        self.heads = blocks[0].self_attn.heads
        self.norm = _Norm(model.norm, self.dtype)
        self.head = _Matrix(model.lm_head.weight, model.dtype)
        modules = [module for module in model.mtp.values() if isinstance(module, MTPModule)]
        self.mtp = _MTP(modules[0], model.dtype, ranks, decode) if modules else None
        positions = torch.arange(model.config.max_position_embeddings, device=self.embedding.device)[None]
        self.turns = torch.complex(*rotary(positions, model.config))[0]  # [S, R/2], each pair's at each position

    @torch.inference_mode()
    def at(self, places: Places) -> "Now":
        """What all layers share of a step at these places."""
        rows, new = places.positions.shape
        if places.even:
            turns = self.turns[places.length - 1]
            return Now(places, rows, turns, turns, None)
        if self.latent_decode is not None:
            turns = self.turns[places.positions.flatten()]
            return Now(places, rows, turns, turns[:, None], None)
        queries = places.positions.flatten()
        hidden = torch.arange(places.length, device=queries.device) > queries[:, None]
        closed = torch.zeros(hidden.shape, dtype=self.dtype, device=queries.device).masked_fill_(hidden, -math.inf)
        closed = closed.view(rows, new, -1)
        if new > 1:  # for each head of each query
            closed = closed[:, :, None].expand(-1, -1, self.heads, -1).flatten(1, 2)
        turns = self.turns[queries]
        return Now(places, rows, turns, turns[:, None], closed)

    @torch.inference_mode()
    def step(self, tokens: Tensor, cache: Cache, now: "Now") -> Tensor:
        """The next tokens of every row [B, T], which go into the cache → final hidden states [B, T, D]."""
        x, values = F.embedding(tokens.flatten(), self.embedding).to(self.dtype), self.own_values(tokens)
        embedded = x
        for layer, kept in zip(self.layers, cache.layers, strict=False):  # the MTP module's comes behind them
            x = layer(x, kept, now, embedded, values)
        return self.norm(x).view(*tokens.shape, -1)

    def chosen(self) -> Tensor:
        """The experts that the newest step chose, in every layer that has any [L, B · T, K]."""
        return torch.stack([layer.mlp.chosen for layer in self.layers if isinstance(layer.mlp, _MoE)])

    @torch.inference_mode()
    def draft(self, hidden: Tensor, tokens: Tensor, last: Tensor, cache: Cache, now: "Now", then: "Now") -> Tensor:
        """The MTP module over `step`'s hidden states [B, T, D] and the tokens that follow them [B, T].

        Only what it makes of one place in each row is asked for: the `last` [B], counted over all B · T, which lie at
        the places of `then`. Returns [B, D].
        """
        assert self.mtp is not None
        embedded = F.embedding(tokens.flatten(), self.embedding).to(self.dtype)
        values = self.own_values(tokens)
        return self.mtp(hidden.flatten(0, 1), embedded, last, cache.layers[-1], now, then, values)

    def own_values(self, tokens: Tensor) -> Tensor | None:
        """Of tokens [B, T] what each adds to the values [B · T, H · V]; None without value embeddings."""
        return None if self.values is None else F.embedding(tokens.flatten(), self.values).to(self.dtype)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, D] → [N, V]."""
        return self.head(hidden)


@dataclass(frozen=True)
class Now:
    """What all layers of a step share."""

    places: Places
    rows: int  # B
    turns: Tensor  # [B · T, R/2], or [R/2] where all are at one position
    turns_of_heads: Tensor  # [B · T, 1, R/2], or the same [R/2]
    # [B, 1 or T · H, S] minus infinity where a query may not look; None where all may see all or a kernel knows who may
    closed: Tensor | None


LatentDecode = Callable[..., Tensor] | None  # `ops.backend.Kernels.latent_decode`


class _Layer:
    def __init__(self, block: Block, dtype: torch.dtype, ranks: Ranks, decode: LatentDecode) -> None:
        self.ranks, self.alone = ranks, ranks.group("tp") is None
        mlp, activations = block.mlp, between(block.input_layernorm.weight.device, dtype)
        self.before_attention = _Norm(block.input_layernorm, activations)
        self.attention = _Attention(block.self_attn, dtype, decode)
        self.before_mlp = _Norm(block.post_attention_layernorm, activations)
        self.share = None if block.embedding_share is None else block.embedding_share.item()
        self.mlp = _MoE(mlp, dtype) if isinstance(mlp, MoE) else _SwiGLU(mlp, dtype)

    def __call__(self, x: Tensor, kept: Tensor, now: Now, embedded: Tensor, values: Tensor | None) -> Tensor:
        """x [B · T, D], kept the layer's part of the cache [(1 + P) · Z, C + R] → [B · T, D].

        Of the tokens, their embedding [B · T, D] and, where they have any, values of their own [B · T, H · V].
        """
        normed, own = self.before_attention.and_values(x, values)
        x = self.beside(x, lambda into: self.attention(into, normed, kept, now, own))
        return self.after_attention(x, embedded)

    def after_attention(self, x: Tensor, embedded: Tensor | None) -> Tensor:
        if embedded is None or self.share is None:
            normed = self.before_mlp(x)
        else:
            normed = self.before_mlp.with_beside(x, embedded, self.share)
        return self.beside(x, lambda into: self.mlp(into, normed))

    def beside(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + branch, which adds its own to what it is given; where ranks have shares of its weights, theirs too."""
        return branch(x) if self.alone else x + self.ranks.total(branch(torch.zeros_like(x)), "tp")


class _MTP:
    """The first MTP module: one layer between a join and a norm (report §2.2)."""

    def __init__(self, module: MTPModule, dtype: torch.dtype, ranks: Ranks, decode: LatentDecode) -> None:
        activations = between(module.eh_proj.weight.device, dtype)
        self.enorm, self.hnorm = _Norm(module.enorm, activations), _Norm(module.hnorm, activations)
        self.join, self.layer = _Matrix(module.eh_proj.weight, dtype), _Layer(module.block, dtype, ranks, decode)
        self.norm = _Norm(module.norm, activations)

    def __call__(
        self,
        hidden: Tensor,
        embedded: Tensor,
        last: Tensor,
        kept: Tensor,
        now: Now,
        then: Now,
        values: Tensor | None,
    ) -> Tensor:
        """hidden, embedded [B · T, D], own values [B · T, H · V] → [B, D]."""
        embedded, values = self.enorm.and_values(embedded, values)
        x, layer = self.join(torch.cat((embedded, self.hnorm(hidden)), dim=-1)), self.layer
        normed, values = layer.before_attention.and_values(x, values)
        q = layer.attention.remember(normed, kept, now, values)
        x, q = x[last], q[last]
        x = layer.beside(x, lambda into: layer.attention.attend(into, q, kept, then))
        return self.norm(layer.after_attention(x, None))


class _Attention:
    """MLA in its absorbed form (report §2.1.1), one query per row."""

    def __init__(self, mla: MLA, dtype: torch.dtype, decode: LatentDecode) -> None:
        self.decode = decode
        device = mla.o_proj.weight.device
        activations = between(device, dtype)
        self.heads, self.scale = mla.heads, mla.scale
        self.nope, self.latent, self.rope = mla.qk_nope_head_dim, mla.latent_width, mla.qk_rope_head_dim
        self.compressed = mla.kv_lora_rank
        up = mla.expansion(activations).detach()
        self.w_uk, w_uv = up.split([self.nope, mla.v_head_dim], dim=1)  # [H, N, C], [H, V, C]
        self.w_uv = w_uv.mT
        query = (mla.q_b_proj if mla.compresses_queries else mla.q_proj).weight.detach()
        out = mla.o_proj.weight.detach()
        # Where the products are small and exact enough: W_UK goes into the queries' matrix, W_UV into the output's.
        size = self.heads * (self.latent + self.rope) * query.shape[1]
        self.folds = size <= SMALL and activations.itemsize >= 4
        if self.folds:
            per_head = query.to(activations).unflatten(0, (self.heads, -1))
            folded = torch.einsum("hnc,hnx->hcx", self.w_uk, per_head[:, : self.nope])
            query = torch.cat((folded, per_head[:, self.nope :]), dim=1).flatten(0, 1)
            out = torch.einsum("hcv,dhv->dhc", self.w_uv, out.to(activations).unflatten(1, (self.heads, -1)))
            out = out.flatten(1)
        first = mla.q_a_proj.weight.detach() if mla.compresses_queries else query
        self.first = first.shape[0]
        self.down = _Matrix(torch.cat((first, mla.kv_a_proj_with_mqa.weight.to(first.dtype))), dtype)
        self.query_norm = _Norm(mla.q_a_layernorm, activations) if mla.compresses_queries else None
        self.query_up = _Matrix(query, dtype) if mla.compresses_queries else None
        self.latent_norm = _Norm(mla.kv_a_layernorm, activations)
        self.out = _Matrix(out, dtype)
        self.nothing = torch.zeros((), dtype=activations, device=device)

    def __call__(self, x: Tensor, normed: Tensor, kept: Tensor, now: Now, values: Tensor | None) -> Tensor:
        """x + attention(normed), both [B · T, D]; the new tokens' latents and keys go to their places in `kept`."""
        return self.attend(x, self.remember(normed, kept, now, values), kept, now)

    def remember(self, normed: Tensor, kept: Tensor, now: Now, values: Tensor | None) -> Tensor:
        """Keeps the latents, own values and keys of normed [B · T, D]; returns what queries are made of [B · T, …]."""
        q, latent, key = self.down(normed).split([self.first, self.compressed, self.rope], dim=-1)
        turn(key, now.turns)
        latent, own = self.latent_norm.and_values(latent, values)
        parts = (latent, key) if own is None else (latent, own, key)
        kept.index_copy_(0, now.places.slots, torch.cat(parts, dim=-1))
        return q

    def attend(self, x: Tensor, q: Tensor, kept: Tensor, now: Now) -> Tensor:
        """x + what the queries [B · T, …] find in `kept` [B · T, D]."""
        n = x.shape[0]
        if self.query_norm is not None and self.query_up is not None:
            q = self.query_up(self.query_norm(q))
        q = q.view(n, self.heads, -1)
        turn(q.narrow(2, q.shape[2] - self.rope, self.rope), now.turns_of_heads)
        if not self.folds:
            folded = torch.bmm(q[..., : self.nope].transpose(0, 1), self.w_uk).transpose(0, 1)  # [B · T, H, C]
            q = torch.cat((folded, q[..., self.nope :]), dim=-1)
        q = q.reshape(now.rows, -1, self.latent + self.rope)  # [B, T · H, C + R]
        heads = self.look(q, kept, now) if self.decode is None else self.look_by_page(q, kept, now, self.decode)
        if not self.folds:
            heads = torch.bmm(heads.view(n, self.heads, -1).transpose(0, 1), self.w_uv).transpose(0, 1)  # [B · T, H, V]
        return self.out.added(x, heads.reshape(n, -1))

    def look(self, q: Tensor, kept: Tensor, now: Now) -> Tensor:
        """The queries [B, T · H, C + R] over what their rows have kept → [B, T · H, C]."""
        seen = now.places.seen(kept)  # [B, S, C + R]
        start, counts = (self.nothing, 0) if now.closed is None else (now.closed, 1)
        scores = torch.baddbmm(start, q, seen.mT, beta=counts, alpha=self.scale)  # [B, T · H, S]
        return torch.bmm(_softmax(scores), seen.narrow(2, 0, self.latent))

    def look_by_page(self, q: Tensor, kept: Tensor, now: Now, decode: Callable[..., Tensor]) -> Tensor:
        """The same by a kernel that finds the pages itself: nothing is gathered."""
        places = now.places
        table, limits = places.table.view(now.rows, -1), places.positions + 1
        return decode(q, kept, table, limits, self.heads, self.latent, places.size, self.scale, places.length)


class _SwiGLU:
    """The dense FFN, or the shared experts as one."""

    def __init__(self, mlp: SwiGLU, dtype: torch.dtype) -> None:
        self.gate_up = _Matrix(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), dtype)
        self.down = _Matrix(mlp.down_proj.weight, dtype)

    def __call__(self, x: Tensor, normed: Tensor) -> Tensor:
        """x + ffn(normed), both [B, D]."""
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return self.down.added(x, F.silu(gate).mul_(up))


class _MoE:
    """Shared and routed experts (report §2.1.2), by whichever way is fastest at this number of rows."""

    def __init__(self, moe: MoE, dtype: torch.dtype) -> None:
        self.moe, self.dtype = moe, dtype
        router = moe.gate.weight.detach()
        self.router = router.to(torch.promote_types(between(router.device, dtype), torch.float32)).t().contiguous()
        gate_up, down = moe.experts.gate_up_proj.detach(), moe.experts.down_proj.detach()
        self.n = len(gate_up)
        self.shared = _SwiGLU(moe.shared_experts, dtype) if moe.shared_experts is not None else None
        rests = resting(gate_up[0].numel(), gate_up.device, dtype)
        self.gate_up, self.down = gate_up.to(rests).unbind(), down.to(rests).unbind()
        self.elements = gate_up.numel() + down.numel()
        self.wide: _Wide | None = None
        self.chosen = torch.empty(0, dtype=torch.int64)  # experts [B, K] of the newest step

    def __call__(self, x: Tensor, normed: Tensor) -> Tensor:
        """x + experts(normed), both [B, D]."""
        gate = self.moe.gate
        experts, weights = gate.select(gate.scores(torch.mm(normed.to(self.router.dtype), self.router)))
        self.chosen = experts
        # Where the tokens meet most experts, all are read whatever one does.
        rows, fits = x.shape[0], self.elements <= WIDE_LAYER
        if 2 * experts.numel() >= self.n and fits and rows <= WIDE_ROWS and rows * self.elements <= WIDE_WORK:
            if self.wide is None:
                self.wide = _Wide(self.moe, self.dtype)
            return x + self.wide(normed, experts, weights)
        if self.shared is not None:
            x = self.shared(x, normed)
        if 2 * experts.numel() < self.n:
            return self.one_by_one(x, normed, experts, weights)
        return x + self.moe.experts(normed.to(self.dtype), experts, weights).to(x.dtype)

    def one_by_one(self, x: Tensor, normed: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Few choices: each reads its own expert, and adds to its row of x."""
        chosen, rests = experts.tolist(), self.down[0].dtype
        rows = normed.to(rests).unbind()
        hidden = torch.stack([self.gate_up[e].mv(row) for row, own in zip(rows, chosen, strict=True) for e in own])
        gate, up = hidden.chunk(2, dim=-1)
        choices = iter(F.silu(gate).mul_(up).unbind())
        for row, own, shares in zip(x.unbind(), chosen, weights.tolist(), strict=True):
            for e, share in zip(own, shares, strict=True):
                if row.dtype == rests:
                    row.addmv_(self.down[e], next(choices), alpha=share)
                else:
                    row.add_(self.down[e].mv(next(choices)), alpha=share)
        return x


class _Wide:
    """All experts of a layer as one FFN, the hidden values of those that a token did not choose multiplied by 0."""

    def __init__(self, moe: MoE, dtype: torch.dtype) -> None:
        gate, up = moe.experts.gate_up_proj.detach().chunk(2, dim=1)  # [E, F, D] each
        down, width = moe.experts.down_proj.detach().transpose(0, 1), gate.shape[1]  # [D, E, F]
        gates, ups, downs = [gate.flatten(0, 1)], [up.flatten(0, 1)], [down.flatten(1)]
        if moe.shared_experts is not None:  # as wide as one expert or several: their share is always 1
            shared = moe.shared_experts
            gates, ups = [*gates, shared.gate_proj.weight], [*ups, shared.up_proj.weight]
            downs.append(shared.down_proj.weight)
        self.gate_up = _Matrix(torch.cat((*gates, *ups)), dtype)  # all gates, then all ups: both halves are whole
        self.down = _Matrix(torch.cat(downs, dim=1), dtype)
        self.blocks = self.down.width // width
        self.shares = torch.ones(WIDE_ROWS, self.blocks, dtype=torch.float32, device=down.device)
        self.shares[:, : len(gate)] = 0

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [B, D] → [B, D]."""
        gate, up = self.gate_up.raw(x).chunk(2, dim=-1)
        share = self.shares[: len(x)].to(weights.dtype).scatter(1, experts, weights).to(gate.dtype)
        hidden = F.silu(gate).mul_(up).view(len(x), self.blocks, -1).mul_(share[..., None])
        return self.down.raw(hidden.flatten(1))


class _Matrix:
    """x Wᵀ of a few rows x, W [out, in] resting as this machine multiplies it fastest."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        device, self.width = weight.device, weight.shape[1]
        weight = weight.detach().to(resting(weight.numel(), device, dtype))
        self.between = between(device, dtype)
        self.packed = device.type == "cpu" and weight.dtype == torch.bfloat16
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        else:
            self.weight = weight.t().contiguous() if device.type == "cpu" else weight.t()

    def raw(self, x: Tensor) -> Tensor:
        """The product in the precision in which W rests."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), self.weight, None, "none", [], "")
        return torch.mm(x.to(self.weight.dtype), self.weight)  # x may come out of a matrix that rests otherwise

    def __call__(self, x: Tensor) -> Tensor:
        return self.raw(x).to(self.between) if self.packed else torch.mm(x, self.weight)

    def added(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x Wᵀ."""
        return residual + self.raw(x) if self.packed else torch.addmm(residual, x, self.weight)


class _Norm:
    """RMSNorm in four small operations: √(|x|² + D · eps) is the hypotenuse of two numbers."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        width = norm.weight.shape[0]
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        self.root = width**0.5
        self.weight = norm.weight.detach().to(self.wide) * self.root
        self.least = torch.tensor((norm.eps * width) ** 0.5, dtype=self.wide, device=norm.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.divided(x, self.length(x))

    def with_beside(self, x: Tensor, beside: Tensor, share: float) -> Tensor:
        """Of x and a share of what is beside it, divided as x is."""
        return self.divided(torch.add(x, beside, alpha=share), self.length(x))

    def and_values(self, x: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The norm of x, and a token's own values divided as x is."""
        length = self.length(x)
        own = None if values is None else torch.div(values, length).mul_(self.root).to(self.dtype)
        return self.divided(x, length), own

    def length(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.wide).hypot_(self.least)

    def divided(self, x: Tensor, length: Tensor) -> Tensor:
        normed = torch.div(x, length).mul_(self.weight)
        return normed if self.dtype == self.wide else normed.to(self.dtype)


def turn(x: Tensor, turns: Tensor) -> None:
    """Turns the pairs of x [..., R] in place by turns [..., R/2], as `ops.heads.apply_rope` does."""
    if x.dtype == torch.float32 or x.dtype == torch.float64:
        x.view(x.dtype.to_complex()).mul_(turns)
    else:
        x.copy_((x.float().view(torch.complex64) * turns).view(torch.float32))


def packs_bf16() -> bool:
    """Whether oneDNN has BF16 code for this CPU: it wants AVX-512 at least."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def between(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What activations are in between the matrices: FP32 on a CPU, where BF16 only adds casts."""
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


def resting(elements: int, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What a matrix of this size rests in."""
    narrow = elements > SMALL and (device.type != "cpu" or dtype != torch.bfloat16 or packs_bf16())
    return dtype if narrow else between(device, dtype)


def _softmax(scores: Tensor) -> Tensor:
    if scores.dtype == torch.float32 or scores.dtype == torch.float64:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
