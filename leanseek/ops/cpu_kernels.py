"""What PyTorch does in many passes on a CPU, in one: norms, SwiGLU, causal softmax, the errors of logits.

Beside a processor's matrix units such passes are most of what a step costs, and they cost a part while a row stays in
the first cache until all is done to it. Numba compiles a function when it is first called and keeps it for later
processes. It does not know BF16, so 16 bits are widened to FP32 by hand; in FP32 is all that happens between, and what
comes of it is rounded once.

The functions of `elementwise`, `heads`, `attention`, `experts`, `loss` and `sampled` call these where `takes` or `suit`
says so, and what they do elsewhere is the specification.

n rows · D width · F width of an expert · T tokens in a row · S candidates · V vocabulary · N tokens · K experts each.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")

DTYPES = (torch.bfloat16, torch.float32)
ENOUGH = 1 << 17  # values that are worth a thread
SUMMED = 256  # rows that are added up in FP32, before FP64 goes on
HALF, ONE, TOP = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
LOG2_E, LN2 = np.float32(1.44269504), np.float32(0.69314718)
LOWEST, NAN = np.float32(-87.0), np.uint16(0x7FC0)

# Sums may be taken in any order, which lets a processor take sixteen terms at once. NaN and infinity stay as they are.
_how: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(cache=True, **_how)(function)
    except RuntimeError:  # there is no folder to keep it in
        return njit(**_how)(function)


def takes(*tensors: Tensor) -> bool:
    """Whether tensors are for the functions here, and autograd need not see what is done to them."""
    return not torch.is_grad_enabled() and suit(*tensors)


def suit(*tensors: Tensor) -> bool:
    """Whether tensors are plain ones in BF16 or FP32 on a CPU, one value behind the other.

    None are while PyTorch's compiler reads along.
    """
    return not torch.compiler.is_compiling() and all(
        type(x) is Tensor and x.device.type == "cpu" and x.dtype in DTYPES and x.is_contiguous() and x.numel()
        for x in tensors
    )


def packed(x: Tensor) -> Tensor:
    """x; on a CPU one value behind the other, so that it suits: copying columns of a wider table costs less."""
    return x.contiguous() if x.device.type == "cpu" else x


# ── what the model calls ──────────────────────────────────────────────────────────────────────────────────────────


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, beside: Tensor | None = None, share: float = 0.0
) -> tuple[Tensor, Tensor]:
    """weight · (x + share · beside) · scale [..., D] and scale [..., 1] in FP32, 1 / √(mean(x²) + eps)."""
    _check(x.shape[-1:] == weight.shape and (beside is None or beside.shape == x.shape))
    out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    rows = _rows(x), _rows(x if beside is None else beside), _rows(out)
    numbers = np.float32(share), _copied(weight), np.float32(eps), scale.flatten().numpy()
    _in_parts(x, lambda first, last: _norm(first, last, *rows, *numbers))
    return out, scale


def rms_norm_backward(
    grad: Tensor,
    grad_scale: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    beside: Tensor | None = None,
    share: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The gradients of x, weight, beside and, in FP32, share [1], of those of `rms_norm`'s results."""
    grad_x, grad_beside = torch.empty_like(x), None if beside is None else torch.empty_like(x)
    of_scale = torch.zeros_like(scale) if grad_scale is None else grad_scale
    _check(grad.shape == x.shape)
    rows = _rows(grad), _rows(x), _rows(x if beside is None else beside)
    results = _rows(grad_x), _rows(grad_x if grad_beside is None else grad_beside)
    numbers = np.float32(share), _copied(weight), _copied(scale), _copied(of_scale)

    def part(first: int, last: int) -> NDArray[np.float64]:
        sums = np.zeros(x.shape[-1] + 1)
        (_norm_backward if beside is None else _norm_beside_backward)(first, last, *rows, *numbers, *results, sums)
        return sums

    sums = torch.from_numpy(np.add.reduce(_in_parts(x, part)))
    return grad_x, sums[:-1].to(weight.dtype), grad_beside, sums[-1:].float()


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) · up of [..., 2F], gate first → [..., F]."""
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    rows = _rows(gate_up), _rows(out)
    _in_parts(out, lambda first, last: _swiglu(first, last, *rows))
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate and up [..., 2F]; their exponentials are taken once more, which here costs less than
    keeping them."""
    grad_gate_up = torch.empty_like(gate_up)
    _check(grad.shape == (*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    rows = _rows(grad), _rows(gate_up), _rows(grad_gate_up)
    _in_parts(grad, lambda first, last: _swiglu_backward(first, last, *rows))
    return grad_gate_up


def causal_softmax(scores: Tensor, scale: float) -> Tensor:
    """softmax(scale · scores) of scores [n, T, T] over the keys up to each query's own, 0 beyond.

    The scores stay: who computes activations again may have kept them.
    """
    _check(scores.shape[-2] == scores.shape[-1])
    p, factor = torch.empty_like(scores), np.float32(scale)
    rows = _rows(scores), _rows(p), scores.shape[-1]
    _in_parts(scores, lambda first, last: _causal_softmax(first, last, *rows, factor))
    return p


def causal_softmax_backward(grad: Tensor, p: Tensor, scale: float) -> Tensor:
    """The gradient of the scores, of that of p = `causal_softmax`(scores, scale), [n, T, T]."""
    _check(grad.shape == p.shape)
    grad_scores, factor = torch.empty_like(p), np.float32(scale)
    rows = _rows(grad), _rows(p), _rows(grad_scores), p.shape[-1]
    _in_parts(grad, lambda first, last: _causal_softmax_backward(first, last, *rows, factor))
    return grad_scores


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, W], the last pairs of each head turned by cos, sin [B or 1, T, R/2] in FP32 → [B, H, T, W]."""
    return _laid_out(x, x.new_empty(x.shape[0], x.shape[2], *x.shape[1::2]), cos, sin, _turned)[1]


def turned_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of x [B, T, H, W], of that of `turned` [B, H, T, W]."""
    return _laid_out(
        grad.new_empty(grad.shape[0], grad.shape[2], *grad.shape[1::2]), grad, cos, -sin, _turned_backward
    )[0]


def _laid_out(
    by_token: Tensor, by_head: Tensor, cos: Tensor, sin: Tensor, way: Callable[..., None]
) -> tuple[Tensor, Tensor]:
    """One of [B, T, H, W] and [B, H, T, W] out of the other."""
    _check(cos.shape == sin.shape and cos.shape[:2] in (by_token.shape[:2], (1, by_token.shape[1])))
    _check(2 * cos.shape[-1] <= by_token.shape[-1] and cos.dtype == sin.dtype == torch.float32)
    rows = _rows(by_token.flatten(2)), _rows(by_head), _rows(cos), _rows(sin), *by_head.shape[1:3]
    _in_parts(by_token.flatten(2), lambda first, last: way(first, last, *rows))
    return by_token, by_head


def keys_and_values(
    kv: Tensor, rope: Tensor, width: int, own: Tensor | None, share: Tensor | None
) -> tuple[Tensor, Tensor]:
    """k [B, H, T, N + R] and v [B, H, T, V] of kv [B, T, H, N + V] and rope [B, T, R]; V is the `width`.

    To v is added own [B, T, H · V] times share [B, T, 1], where they are given.
    """
    batch, tokens, heads, both = kv.shape
    _check(rope.shape[:2] == kv.shape[:2] and width <= both and (own is None) == (share is None))
    _check(own is None or own.shape == (batch, tokens, heads * width))
    _check(share is None or share.shape == (batch, tokens, 1))
    k, v = kv.new_empty(batch, heads, tokens, both - width + rope.shape[-1]), kv.new_empty(batch, heads, tokens, width)
    rows = (
        _rows(kv.flatten(2)),
        _rows(rope),
        _rows(rope if own is None else own),
        np.zeros(1, np.float32) if share is None else _copied(share),
        _rows(k),
        _rows(v),
    )
    _in_parts(kv.flatten(2), lambda first, last: _keys_and_values(first, last, *rows, tokens, heads, own is not None))
    return k, v


def keys_and_values_backward(
    grad_k: Tensor, grad_v: Tensor, own: Tensor | None, share: Tensor | None, nope: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The gradients of kv, rope, own and, in FP32, share [B, T, 1], of those of `keys_and_values`."""
    batch, heads, tokens, width = grad_v.shape
    _check(grad_k.shape[:3] == grad_v.shape[:3] and nope <= grad_k.shape[-1])
    _check(own is None or (share is not None and own.numel() == grad_v.numel() and share.numel() == batch * tokens))
    grad_kv = grad_v.new_empty(batch, tokens, heads, nope + width)
    grad_rope = grad_k.new_empty(batch, tokens, grad_k.shape[-1] - nope)
    grad_own = None if own is None else torch.empty_like(own)
    grad_share = grad_v.new_empty(batch, tokens, 1, dtype=torch.float32)
    given = (
        _rows(grad_k),
        _rows(grad_v),
        _rows(grad_v if own is None else own),
        np.zeros(1, np.float32) if share is None else _copied(share),
    )
    found = (
        _rows(grad_kv.flatten(2)),
        _rows(grad_rope),
        _rows(grad_v if grad_own is None else grad_own),
        grad_share.flatten().numpy(),
    )
    numbers = tokens, heads, own is not None
    _in_parts(grad_kv.flatten(2), lambda first, last: _keys_and_values_backward(first, last, *given, *found, *numbers))
    return grad_kv, grad_rope, grad_own, grad_share


def unpermute_backward(grad: Tensor, rows: Tensor, weights: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of rows [P, D] and weights [N, K] of Σₖ weights[n, k] · rows[place[n, k]], whose own is [N, D]."""
    grad_rows, grad_weights = torch.zeros_like(rows), torch.empty_like(weights)
    _check(weights.shape == place.shape and rows.shape[-1] == grad.shape[-1] and int(place.max()) < rows.shape[0])
    bits = [_rows(x) for x in (grad, rows, weights, grad_rows, grad_weights)]
    where = place.numpy()
    _in_parts(grad, lambda first, last: _unpermute_backward(first, last, *bits, where))
    return grad_rows, grad_weights


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [n, V] become p − 1 at the target, p elsewhere, 0 where the target [n] is below 0; returns −log p of each
    target in nats [n] in FP32, or 0."""
    _check(logits.shape[:1] == targets.shape and int(targets.max()) < logits.shape[1])
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    rows = _rows(logits), losses.numpy(), targets.numpy()
    _in_parts(logits, lambda first, last: _cross_entropy(first, last, *rows))
    return losses


class Wish(NamedTuple):
    """What the probabilities of n rows should be: `share` of it what a table and single candidates say, the rest the
    target.

    q(candidate j | row i) = scale[i] · times[j] · base[row[i], token of j], and more for the candidates single[k], k
    from first[i] to before first[i + 1]: times · shares[k].
    """

    target: Tensor  # [n] a candidate; below 0 where there is none
    share: float
    base: Tensor  # [R, V]
    row: Tensor  # [n]
    scale: Tensor  # [n]
    first: Tensor  # [n + 1]
    single: Tensor  # [m] below 0: no candidate
    shares: Tensor  # [m]


def errors(logits: Tensor, times: Tensor, frequent: int, group: slice, beyond: Tensor, wish: Wish) -> Tensor:
    """logits [n, S] become p − what is wished; returns −log p of each target in nats [n] in FP32.

    Candidates are the first `frequent` tokens, those of the `group`, and those `beyond`, and stand for so many `times`
    [S] tokens like them.
    """
    _check(logits.shape == (len(wish.target), len(times)) and int(wish.target.max()) < len(times))
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    rows = _rows(logits), losses.numpy(), wish.target.numpy()
    candidates = times.numpy(), frequent, group.start, beyond.numpy()
    wished = np.float32(wish.share), _rows(wish.base), *(x.numpy() for x in wish[3:])
    _in_parts(logits, lambda first, last: _errors(first, last, *rows, *candidates, *wished))
    return losses


# ── on all threads ────────────────────────────────────────────────────────────────────────────────────────────────


def _in_parts(x: Tensor, work: Callable[[int, int], T]) -> list[T]:
    """What `work` makes of each part of x's rows, from the first to before the last: a part for each of PyTorch's
    threads, where there is enough to do."""
    rows, threads = x.numel() // x.shape[-1], torch.get_num_threads()
    parts = min(threads, -(-x.numel() // ENOUGH))
    if parts == 1:
        return [work(0, rows)]
    cuts, pool = [rows * k // parts for k in range(parts + 1)], _threads(os.getpid(), threads - 1)
    others = [pool.submit(work, *cuts[k : k + 2]) for k in range(1, parts)]
    return [work(0, cuts[1]), *(other.result() for other in others)]


@lru_cache(maxsize=1)
def _threads(process: int, many: int) -> ThreadPoolExecutor:
    """A forked process has none of its parent's threads."""
    return ThreadPoolExecutor(many)


def _check(fits: bool) -> None:
    """What is compiled looks at no bounds."""
    if not fits:
        raise ValueError("shapes or indices do not fit")


def _rows(x: Tensor) -> NDArray[Any]:
    """x as it lies in memory, [n, width]: BF16 as 16 bits each, FP32 as it is."""
    x = x.detach()
    rows: NDArray[Any] = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).view(-1, x.shape[-1]).numpy()
    return rows


def _copied(x: Tensor) -> NDArray[np.float32]:
    """Numbers [n] in FP32. FSDP frees the memory of a weight, which it cannot where NumPy has looked."""
    copied: NDArray[np.float32] = x.detach().to(torch.float32, copy=True).flatten().numpy()
    return copied


# ── a value ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _wide(value):
    """A value of an array in FP32."""


def _rounded(x, array):
    """FP32 as the array keeps it: BF16 to the nearest, ties to even."""


def _largest(row):
    """Of a row, in FP32. NaN may be overlooked: it is in the sum of exponentials."""


@overload(_wide)
def _wide_of(value):
    if value == types.float32:
        return lambda value: value
    return lambda value: np.uint32(np.uint32(value) << TOP).view(np.float32)


@overload(_rounded)
def _rounded_for(x, array):
    if array.dtype == types.float32:
        return lambda x, array: x

    def narrow(x, array):
        bits = np.float32(x).view(np.uint32)
        rounded = np.uint16(np.uint32(bits + HALF + (np.uint32(bits >> TOP) & ONE)) >> TOP)
        return rounded if x == x else NAN

    return narrow


@overload(_largest)
def _largest_of(row):
    """In whole numbers that grow with the value, for of floating ones a compiler takes one maximum after the other."""
    whole: Any = np.int32 if row.dtype == types.float32 else np.int16
    sign, rest = whole(np.iinfo(whole).bits - 1), whole(np.iinfo(whole).max)

    def largest(row):
        bits, most = row.view(whole), whole(-rest - 1)
        for j in range(len(bits)):
            each = whole(bits[j] ^ whole(whole(bits[j] >> sign) & rest))
            most = each if each > most else most
        most = whole(most ^ whole(whole(most >> sign) & rest))
        return _wide(most.view(row.dtype))

    return largest


@njit(**_how)
def _exp(x):
    """By Cephes' polynomial, of x up to 88, to 2⁻²⁴ (4 + 1.5 |x|) of the value; below −87 as of −87. NaN stays."""
    x = LOWEST if x < LOWEST else x
    n = np.floor(x * LOG2_E + np.float32(0.5))
    r = x - n * LN2
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)).view(np.float32)


@njit(**_how)
def _sigmoid(x):
    found = np.float32(1.0) / (np.float32(1.0) + _exp(-x if x > LOWEST else -LOWEST))
    return np.float32(0.0) if x < LOWEST else found


@njit(**_how)
def _place(i, h, heads, tokens):
    """The row of head h of token i, of all tokens of a batch, where heads come first."""
    return (i // tokens * heads + h) * tokens + i % tokens


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@compiled
def _norm(first, last, x, beside, out, share, weight, eps, scale):
    width = x.shape[1]
    for i in range(first, last):
        squares = np.float32(0.0)
        for j in range(width):
            a = _wide(x[i, j])
            squares += a * a
        r = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        scale[i] = r
        for j in range(width):
            out[i, j] = _rounded((_wide(x[i, j]) + share * _wide(beside[i, j])) * r * weight[j], out)


@compiled
def _norm_backward(first, last, grad, x, beside, share, weight, scale, grad_scale, grad_x, grad_beside, sums):
    """`sums` gets the weight's gradient."""
    width = x.shape[1]
    of_weight = np.zeros(width, np.float32)
    for i in range(first, last):
        r, along = scale[i], np.float32(0.0)
        for j in range(width):
            both = _wide(x[i, j]) * _wide(grad[i, j])
            of_weight[j] += both * r
            along += both * weight[j]
        # What points along x does not count: the norm takes it out again.
        back = (along + grad_scale[i]) * r * r * r / np.float32(width)
        for j in range(width):
            grad_x[i, j] = _rounded(_wide(grad[i, j]) * weight[j] * r - back * _wide(x[i, j]), grad_x)
        if i % SUMMED == 0 or i == last - 1:
            sums[:width] += of_weight
            of_weight[:] = 0


@compiled
def _norm_beside_backward(first, last, grad, x, beside, share, weight, scale, grad_scale, grad_x, grad_beside, sums):
    """`sums` gets the gradients of weight and share."""
    width = x.shape[1]
    of_weight = np.zeros(width, np.float32)
    for i in range(first, last):
        r, along, of_share = scale[i], np.float32(0.0), np.float32(0.0)
        for j in range(width):
            both = (_wide(x[i, j]) + share * _wide(beside[i, j])) * _wide(grad[i, j])
            of_weight[j] += both * r
            along += both * weight[j]
        back = (along + grad_scale[i]) * r * r * r / np.float32(width)
        for j in range(width):
            of_both, other = _wide(grad[i, j]) * weight[j] * r, _wide(beside[i, j])
            of_share += of_both * other
            grad_x[i, j] = _rounded(of_both - back * _wide(x[i, j]), grad_x)
            grad_beside[i, j] = _rounded(of_both * share, grad_beside)
        sums[width] += of_share
        if i % SUMMED == 0 or i == last - 1:
            sums[:width] += of_weight
            of_weight[:] = 0


@compiled
def _swiglu(first, last, gate_up, out):
    width = out.shape[1]
    for i in range(first, last):
        for j in range(width):
            gate = _wide(gate_up[i, j])
            out[i, j] = _rounded(gate * _sigmoid(gate) * _wide(gate_up[i, width + j]), out)


@compiled
def _swiglu_backward(first, last, grad, gate_up, grad_gate_up):
    width = grad.shape[1]
    for i in range(first, last):
        for j in range(width):
            gate, up, g = _wide(gate_up[i, j]), _wide(gate_up[i, width + j]), _wide(grad[i, j])
            sigmoid = _sigmoid(gate)
            grad_gate_up[i, j] = _rounded(
                g * up * sigmoid * (np.float32(1.0) + gate * (np.float32(1.0) - sigmoid)), grad_gate_up
            )
            grad_gate_up[i, width + j] = _rounded(g * gate * sigmoid, grad_gate_up)


@compiled
def _causal_softmax(first, last, scores, p, length, scale):
    for i in range(first, last):
        keys = i % length + 1
        row, out = scores[i, :keys], p[i, :keys]
        largest, total = _largest(row), np.float32(0.0)
        for j in range(keys):
            total += _exp((_wide(row[j]) - largest) * scale)
        part = np.float32(1.0) / total
        for j in range(keys):
            out[j] = _rounded(_exp((_wide(row[j]) - largest) * scale) * part, out)
        p[i, keys:] = 0


@compiled
def _causal_softmax_backward(first, last, grad, p, grad_scores, length, scale):
    for i in range(first, last):
        keys = i % length + 1
        back, own, out, along = grad[i, :keys], p[i, :keys], grad_scores[i, :keys], np.float32(0.0)
        for j in range(keys):
            along += _wide(back[j]) * _wide(own[j])
        for j in range(keys):
            out[j] = _rounded((_wide(back[j]) - along) * _wide(own[j]) * scale, out)
        grad_scores[i, keys:] = 0


@compiled
def _turned(first, last, x, out, cos, sin, heads, tokens):
    width = out.shape[1]
    for i in range(first, last):
        for h in range(heads):
            _turn(
                x[i, h * width : (h + 1) * width],
                out[_place(i, h, heads, tokens)],
                cos[i % len(cos)],
                sin[i % len(sin)],
            )


@compiled
def _turned_backward(first, last, grad_x, grad, cos, sin, heads, tokens):
    width = grad.shape[1]
    for i in range(first, last):
        for h in range(heads):
            into = grad_x[i, h * width : (h + 1) * width]
            _turn(grad[_place(i, h, heads, tokens)], into, cos[i % len(cos)], sin[i % len(sin)])


@njit(inline="always", **_how)  # else it takes twice as long
def _turn(row, into, c, s):
    kept = len(row) - 2 * len(c)
    for j in range(kept):
        into[j] = row[j]
    row, into = row[kept:], into[kept:]
    for j in range(len(c)):
        a, b = _wide(row[2 * j]), _wide(row[2 * j + 1])
        into[2 * j] = _rounded(a * c[j] - b * s[j], into)
        into[2 * j + 1] = _rounded(a * s[j] + b * c[j], into)


@compiled
def _keys_and_values(first, last, kv, rope, own, share, k, v, tokens, heads, brings):
    width, turned = v.shape[1], rope.shape[1]
    nope = k.shape[1] - turned
    for i in range(first, last):
        for h in range(heads):
            at = _place(i, h, heads, tokens)
            row, key, into, both = kv[i, h * (nope + width) : (h + 1) * (nope + width)], k[at], v[at], rope[i]
            for j in range(nope):
                key[j] = row[j]
            value, key = row[nope:], key[nope:]
            for j in range(turned):
                key[j] = both[j]
            if brings:
                more = own[i, h * width : (h + 1) * width]
                for j in range(width):
                    into[j] = _rounded(_wide(value[j]) + share[i] * _wide(more[j]), into)
            else:
                for j in range(width):
                    into[j] = value[j]


@compiled
def _keys_and_values_backward(
    first, last, grad_k, grad_v, own, share, grad_kv, grad_rope, grad_own, grad_share, tokens, heads, brings
):  # fmt: skip
    width, turned = grad_v.shape[1], grad_rope.shape[1]
    nope = grad_k.shape[1] - turned
    of_rope = np.empty(turned, np.float32)
    for i in range(first, last):
        of_rope[:], of_share = 0, np.float32(0.0)
        for h in range(heads):
            at = _place(i, h, heads, tokens)
            back, into = grad_k[at], grad_kv[i, h * (nope + width) : (h + 1) * (nope + width)]
            for j in range(nope):
                into[j] = back[j]
            back, into = back[nope:], into[nope:]
            for j in range(turned):
                of_rope[j] += _wide(back[j])
            back = grad_v[at]
            for j in range(width):
                into[j] = back[j]
            if brings:
                more, into = own[i, h * width : (h + 1) * width], grad_own[i, h * width : (h + 1) * width]
                for j in range(width):
                    g = _wide(back[j])
                    of_share += g * _wide(more[j])
                    into[j] = _rounded(g * share[i], into)
        grad_share[i] = of_share
        for j in range(turned):
            grad_rope[i, j] = _rounded(of_rope[j], grad_rope)


@compiled
def _unpermute_backward(first, last, grad, rows, weights, grad_rows, grad_weights, place):
    width = grad.shape[1]
    for i in range(first, last):
        for k in range(place.shape[1]):
            row, into, weight, along = rows[place[i, k]], grad_rows[place[i, k]], _wide(weights[i, k]), np.float32(0.0)
            for j in range(width):
                g = _wide(grad[i, j])
                along += g * _wide(row[j])
                into[j] = _rounded(g * weight, into)
            grad_weights[i, k] = _rounded(along, grad_weights)


@compiled
def _cross_entropy(first, last, logits, losses, target):
    p = np.empty(logits.shape[1], np.float32)
    for i in range(first, last):
        row = logits[i]
        if target[i] < 0:
            losses[i] = np.float32(0.0)
            row[:] = 0
            continue
        largest, total = _largest(row), np.float32(0.0)
        for j in range(len(row)):
            e = _exp(_wide(row[j]) - largest)
            p[j] = e
            total += e
        losses[i] = largest + np.log(total) - _wide(row[target[i]])
        part = np.float32(1.0) / total
        for j in range(len(row)):
            row[j] = _rounded(p[j] * part, row)
        row[target[i]] = _rounded(p[target[i]] * part - np.float32(1.0), row)


@compiled
def _errors(
    first, last, logits, losses, target, times, frequent, group, beyond, share, base, base_row, scale, begins, single,
    shares,
):  # fmt: skip
    size = logits.shape[1]
    end = size - len(beyond)
    p = np.empty(size, np.float32)
    # Cut beforehand, for of `p[j + 1]` a compiler does not see that it is one value behind the other.
    p_group, p_beyond, times_group, times_beyond = p[frequent:end], p[end:], times[frequent:end], times[end:]
    for i in range(first, last):
        row = logits[i]
        if target[i] < 0:
            losses[i] = np.float32(0.0)
            row[:] = 0
            continue
        largest, total = _largest(row), np.float32(0.0)
        for j in range(size):
            e = _exp(_wide(row[j]) - largest) * times[j]
            p[j] = e
            total += e
        losses[i] = largest + np.log(total) - _wide(row[target[i]])
        part, factor, expected = np.float32(1.0) / total, share * scale[i], base[base_row[i]]
        expected_group = expected[group : group + len(p_group)]
        for j in range(frequent):
            p[j] = p[j] * part - factor * _wide(expected[j])
        for j in range(len(p_group)):
            p_group[j] = p_group[j] * part - factor * times_group[j] * _wide(expected_group[j])
        for j in range(len(p_beyond)):
            p_beyond[j] = p_beyond[j] * part - factor * times_beyond[j] * _wide(expected[beyond[j]])
        p[target[i]] -= np.float32(1.0) - share
        for k in range(begins[i], begins[i + 1]):
            if single[k] >= 0:
                p[single[k]] -= share * times[single[k]] * shares[k]
        for j in range(size):
            row[j] = _rounded(p[j], row)
