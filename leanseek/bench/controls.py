"""What LeanSeek is measured against: two dense models with a training loop of their own, as good as we can make them.

`ordinary` is the common way to pre-train a small model: GPT-2's block as nanoGPT trains it. `best` is the public
speedruns' practice at this size: RoPE, RMSNorm and QK-norm without weights, squared ReLU, value embeddings, zero-
initialised outputs, Muon, and a learning rate that is constant and then falls to zero; and our sampled softmax. Both
keep FP32 weights and a FP32 residual stream around matmuls of `dtype`, and share our attention and loss kernels.

B windows · T tokens · D width · H heads · V vocabulary.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from leanseek import checkpoint
from leanseek.data.shards import Data
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.bpb import bits_per_byte
from leanseek.model.layers import Linear, RMSNorm
from leanseek.model.transformer import Transformer
from leanseek.ops.attention import attention
from leanseek.ops.heads import turned
from leanseek.ops.loss import linear_cross_entropy
from leanseek.ops.sampled import by_frequency, sampled_cross_entropy
from leanseek.train.optim import Muon
from leanseek.train.pretrain import validation_documents

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKPOINT_EVERY = 100  # steps
EPS = 1e-6  # of RMSNorm


@dataclass(frozen=True)
class Control:
    """Every setting of a control's run, beside its seed."""

    kind: Literal["ordinary", "best"]
    tokens: int
    learning_rate: float
    batch_tokens: int
    vocab_size: int = 4096
    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 256
    weight_decay: float = 0.1
    warmup: float = 0.0625  # share of the steps: ordinary climbs from 0, then half a cosine leads to a tenth
    decay: float = 0.4  # share of the steps: best is constant, then falls to 0 in a line
    embedding_rate: float = 20.0  # best: rates of embeddings and head over that of the matrices
    head_rate: float = 1.0
    windows_at_once: int = 16  # of a pass; the batch is reached by accumulation
    # Share of the steps in which the softmax is sampled: over the most frequent ids, and one group of the others.
    sampled: float = 0.0
    frequent: int = 2048
    groups: int = 4

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.batch_tokens)


# ── ordinary ──────────────────────────────────────────────────────────────────────────────────────────────────────


class OrdinaryBlock(nn.Module):
    def __init__(self, control: Control, dtype: torch.dtype) -> None:
        super().__init__()
        width = control.width
        self.heads, self.dtype = control.heads, dtype
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv_proj = Linear(width, 3 * width)
        self.o_proj = Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up_proj = Linear(width, 4 * width)
        self.down_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] in FP32 → the same."""
        qkv = self.qkv_proj(self.attention_norm(x).to(self.dtype))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, D/H]
        mixed = attention(q, k, v, q.shape[-1] ** -0.5).transpose(1, 2).flatten(2)
        x = x + self.o_proj(mixed)
        return x + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x).to(self.dtype))))


class Ordinary(nn.Module):
    """GPT-2 without biases: learned positions, LayerNorm, GELU, a head tied to the embedding."""

    def __init__(self, control: Control, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.lm_head = nn.Embedding(control.vocab_size, control.width)  # looks tokens up as well
        self.embed_positions = nn.Embedding(control.context, control.width)
        self.blocks = nn.ModuleList(OrdinaryBlock(control, dtype) for _ in range(control.layers))
        self.norm = nn.LayerNorm(control.width, bias=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids, positions [B, T] → hidden states for the head [B, T, D]."""
        x = self.lm_head(ids) + self.embed_positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).to(self.dtype)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """N(0, 0.02²), and less where a block writes into the residual stream."""
        residual = 0.02 / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                std = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                parameter.normal_(0.0, std, generator=generator)


def ordinary_optimizers(model: Ordinary, control: Control) -> list[Optimizer]:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": control.weight_decay, "rate": 1.0},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "rate": 1.0},
    ]
    return [AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)]


# ── best ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class BestBlock(nn.Module):
    def __init__(self, control: Control, dtype: torch.dtype) -> None:
        super().__init__()
        width = control.width
        self.heads, self.dtype = control.heads, dtype
        self.qkv_proj = nn.Parameter(torch.empty(3, width, width))  # three matrices to Muon
        self.attention_norm = RMSNorm(width, EPS)
        self.q_norm = RMSNorm(width // control.heads, EPS)
        self.k_norm = RMSNorm(width // control.heads, EPS)
        self.o_proj = Linear(width, width)
        self.mlp_norm = RMSNorm(width, EPS)
        self.up_proj = Linear(width, 4 * width)
        self.down_proj = Linear(4 * width, width)
        self.shares = nn.Parameter(torch.tensor([1.0, 0.0, 0.5]))  # of the stream, its beginning, the value embedding

    def forward(self, x: Tensor, first: Tensor, value: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x and first [B, T, D], value [B, T, H, D/H], rope each [1, T, D/H/2] → [B, T, D]."""
        x = self.shares[0] * x + self.shares[1] * first
        qkv = F.linear(self.attention_norm(x), self.qkv_proj.flatten(0, 1).to(x.dtype))
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in qkv.chunk(3, dim=-1))  # each [B, T, H, D/H]
        q, k = turned(self.q_norm(q), *rope), turned(self.k_norm(k), *rope)
        v = torch.addcmul(v, value, self.shares[2].to(v.dtype)).transpose(1, 2)
        x = x + self.o_proj(attention(q, k, v, q.shape[-1] ** -0.5).transpose(1, 2).flatten(2))
        return x + self.down_proj(F.relu(self.up_proj(self.mlp_norm(x))).square())


class Best(nn.Module):
    """The dense transformer of the speedruns: an embedding of its own for the values of each layer, an untied head."""

    def __init__(self, control: Control, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.head_width = dtype, control.width // control.heads
        self.embed_tokens = nn.Embedding(control.vocab_size, control.width)
        self.embed_values = nn.Embedding(control.vocab_size, control.width)
        self.embed_norm = RMSNorm(control.width, EPS)
        self.blocks = nn.ModuleList(BestBlock(control, dtype) for _ in range(control.layers))
        self.norm = RMSNorm(control.width, EPS)
        self.lm_head = Linear(control.width, control.vocab_size)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids, positions [B, T], the same positions in every window → hidden states for the head [B, T, D]."""
        frequencies = 1024.0 ** -torch.linspace(0, 1, self.head_width // 2, device=ids.device)
        angles = positions[:1, :, None] * frequencies
        rope = angles.cos(), angles.sin()
        x = first = self.embed_norm(self.embed_tokens(ids).to(self.dtype))
        value = self.embed_values(ids).to(self.dtype).unflatten(-1, (-1, self.head_width))
        for block in self.blocks:
            x = block(x, first, value, rope)
        return self.norm(x)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Matrices by their width, embeddings of unit scale; whatever writes into the stream or the logits is zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
            elif name.startswith(("embed_tokens", "embed_values")):
                parameter.normal_(0.0, 1.0, generator=generator)
            elif parameter.dim() >= 2:
                parameter.normal_(0.0, 0.5 * parameter.shape[-1] ** -0.5, generator=generator)


def best_optimizers(model: Best, control: Control) -> list[Optimizer]:
    named = dict(model.named_parameters())
    embeddings = [named["embed_tokens.weight"], named["embed_values.weight"]]
    matrices = [p for name, p in named.items() if name.endswith(("proj", "proj.weight"))]
    small = [p for p in named.values() if p.dim() == 1]
    groups = [
        {"params": embeddings, "rate": control.embedding_rate},
        {"params": [named["lm_head.weight"]], "rate": control.head_rate},
        {"params": small, "rate": 1.0},
    ]
    adamw = AdamW(groups, lr=0.0, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    muon = Muon([{"params": matrices, "rate": 1.0}], 0.95, control.weight_decay, 5, model.dtype)
    return [muon, adamw]


# ── both ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def build(control: Control, dtype: str, seed: int) -> tuple[Ordinary | Best, list[Optimizer]]:
    """The initialised model and its optimizers."""
    generator = torch.Generator().manual_seed(seed)
    if control.kind == "ordinary":
        ordinary = Ordinary(control, DTYPES[dtype])
        ordinary.initialise(generator)
        return ordinary, ordinary_optimizers(ordinary, control)
    best = Best(control, DTYPES[dtype])
    best.initialise(generator)
    return best, best_optimizers(best, control)


def learning_rate(control: Control, step: int) -> float:
    """The rate of step 0, 1, …, `control.steps` − 1."""
    if control.kind == "ordinary":
        warmup = round(control.warmup * control.steps)
        if step < warmup:
            return control.learning_rate * (step + 1) / (warmup + 1)
        way = (step - warmup) / max(control.steps - warmup, 1)
        return control.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * way)) / 2)
    return control.learning_rate * min(1.0, (control.steps - step) / (control.decay * control.steps))


def parameter_count(control: Control) -> int:
    model, _ = build(control, "fp32", 0)
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(control: Control) -> float:
    """Training FLOPs as `plan/count.py` counts them: six per weight of a matmul, and the causal half of attention."""
    sampled = control.sampled * (1 - 1 / control.groups) * max(control.vocab_size - control.frequent, 0)
    weights = control.layers * 12 * control.width**2 + (control.vocab_size - sampled) * control.width
    mixing = control.layers * 2 * control.width * (control.context + 1) / 2
    return 6.0 * (weights + mixing)


class Windows:
    """Training text as one stream, BOS before each document; windows of it, a pure function of seed and step."""

    def __init__(self, data: Data, context: int, bos_id: int) -> None:
        self.context = context
        parts: list[NDArray[np.integer]] = []
        for ids, _ in data.documents("train"):
            parts += [np.array([bos_id], ids.dtype), ids]
        self.stream = np.concatenate(parts)
        self._order = lru_cache(maxsize=2)(lambda *words: np.random.default_rng(words[:2]).permutation(words[2]))

    def batch(self, kind: str, seed: int, step: int, count: int) -> tuple[Tensor, Tensor]:
        """ids and targets [count, T]: for `ordinary` from random places, for `best` each window once per epoch."""
        if kind == "ordinary":
            starts = np.random.default_rng([seed, step]).integers(len(self.stream) - self.context, size=count)
        else:
            whole = (len(self.stream) - 1) // self.context
            numbers = np.arange(step * count, (step + 1) * count)
            starts = (
                np.array([self._order(seed, n // whole, whole)[n % whole] for n in numbers.tolist()]) * self.context
            )
        windows = torch.from_numpy(self.stream[starts[:, None] + np.arange(self.context + 1)].astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden states, the head's weight, and targets


def sampled_loss(control: Control, stream: NDArray[np.integer]) -> LossOf:
    """`linear_cross_entropy`, sampled by how often tokens come in the stream."""
    times = torch.from_numpy(np.bincount(stream, minlength=control.vocab_size))
    return partial(sampled_cross_entropy, vocabulary=by_frequency(times, control.frequent, control.groups))


def train_step(
    model: Ordinary | Best,
    optimizers: list[Optimizer],
    ids: Tensor,
    targets: Tensor,
    rate: float,
    control: Control,
    loss_of: LossOf = linear_cross_entropy,
) -> float:
    """One update from ids and targets [B, T] of the whole batch; returns the mean loss in nats."""
    positions, total = torch.arange(ids.shape[1]), 0.0
    for some, wanted in zip(ids.split(control.windows_at_once), targets.split(control.windows_at_once), strict=True):
        hidden = model(some, positions.expand_as(some))
        loss = loss_of(hidden.flatten(0, 1), model.lm_head.weight, wanted.flatten()) / targets.numel()
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def train(
    control: Control,
    dtype: str,
    seed: int,
    data: Data,
    run: Path,
    evaluations: int,
    most_steps: int | None = None,
    scored_tokens: float = math.inf,
) -> dict[str, Any]:
    """Trains RUN or goes on where it was killed; returns step, tokens, seconds, cpu_seconds, loss and `curve`.

    The curve has [tokens, bpb] at `evaluations` even distances, the end included, on validation documents up to
    `scored_tokens` tokens. `most_steps` ends this call earlier. `step_cpu_seconds` are those of the steps of this call.
    """
    bos_id = Tokenizer.load(data.tokenizer_folder).bos_id
    windows = Windows(data, control.context, bos_id)
    documents = validation_documents(data, scored_tokens)
    model, optimizers = build(control, dtype, seed)
    sampled = sampled_loss(control, windows.stream)
    at: dict[str, Any] = {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "loss": math.nan, "curve": []}
    with checkpoint.lock(run):
        if newest := checkpoint.newest(run, print):
            at = checkpoint.load(newest, model, optimizers)
        steps, per_step = control.steps, []
        marks = {round(steps * i / evaluations) for i in range(1, evaluations + 1)}
        until = steps if most_steps is None else min(steps, most_steps)
        began, cpu_began = time.monotonic() - at["seconds"], time.process_time() - at["cpu_seconds"]
        while at["step"] < until:
            cpu = time.process_time()
            count = control.batch_tokens // control.context
            ids, targets = windows.batch(control.kind, seed, at["step"], count)
            loss_of = sampled if at["step"] < control.sampled * steps else linear_cross_entropy
            rate = learning_rate(control, at["step"])
            at["loss"] = train_step(model, optimizers, ids, targets, rate, control, loss_of)
            per_step.append(time.process_time() - cpu)
            at["step"] += 1
            if at["step"] in marks:
                bpb = bits_per_byte(cast(Transformer, model), documents, control.context, bos_id).bpb
                at["curve"].append([at["step"] * control.batch_tokens, bpb])
            at["seconds"], at["cpu_seconds"] = time.monotonic() - began, time.process_time() - cpu_began
            if at["step"] % CHECKPOINT_EVERY == 0 and at["step"] < steps:
                checkpoint.save(run, at["step"], model, optimizers, at, keep=1)
    return at | {"tokens": at["step"] * control.batch_tokens, "step_cpu_seconds": per_step}
