"""The CPU's kernels, each against what PyTorch makes of the same values in FP64."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from leanseek.ops import cpu_kernels
from leanseek.ops.attention import attention, attention_reference
from leanseek.ops.elementwise import (
    rms_norm,
    rms_norm_and_scale,
    rms_norm_beside,
    rms_norm_beside_reference,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
)
from leanseek.ops.experts import lay_out, unpermute
from leanseek.ops.heads import keys_and_values, keys_and_values_reference, turned, turned_reference
from leanseek.ops.loss import IGNORE, losses_and_error
from leanseek.ops.sampled import Expected, by_frequency, sampled_cross_entropy

T = TypeVar("T")

HALF_A_PLACE = 2.0**-8  # of BF16, relative, at the most


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The work is divided, and it is our kernels that do it."""
    parts: list[int] = []
    in_parts = cpu_kernels._in_parts

    def counted(x: Tensor, work: Callable[[int, int], T]) -> list[T]:
        results = in_parts(x, work)
        parts.append(len(results))
        return results

    monkeypatch.setattr(cpu_kernels, "ENOUGH", 8)
    monkeypatch.setattr(cpu_kernels, "_in_parts", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    yield
    assert parts
    assert max(parts) <= request.param


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def assert_rounded(found: Tensor, wanted: Tensor, absolute: float = 1e-6) -> None:
    """found is what wanted in FP64 rounds to, but for errors of FP32, `absolute` to the largest value."""
    rounding = HALF_A_PLACE * 1.001 if found.dtype == torch.bfloat16 else 0.0
    assert found.dtype != torch.float64
    assert bool(((found.double() - wanted).abs() <= rounding * wanted.abs() + absolute * wanted.abs().max()).all())


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    out = function(*(x.requires_grad_() for x in inputs))
    return out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))


def against_fp64(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> list[tuple[Tensor, Tensor]]:
    """Result and gradients of a function, beside those of its reference in FP64."""
    grad = torch.randn_like(function(*inputs))
    found = gradients(function, tuple(x.clone() for x in inputs), grad)
    return list(zip(found, gradients(reference, tuple(x.double() for x in inputs), grad), strict=True))


def normal(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """All but NaN and numbers so small that a process may take them for zero."""
    size = values.view(np.uint32) & 0x7FFFFFFF
    return (size == 0) | ((size >= 1 << 23) & (size <= 255 << 23))


# ── a value ───────────────────────────────────────────────────────────────────────────────────────────────────────


@njit
def there_and_back(values, into):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        into[i] = cpu_kernels._rounded(cpu_kernels._wide(values[i]), into)


@njit
def largest(row):  # type: ignore[no-untyped-def]
    return cpu_kernels._largest(row)


def test_every_value_of_bf16_is_widened_and_rounded_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wanted = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    wide, narrow, sayable = np.empty_like(wanted), np.empty_like(bits), normal(wanted)
    there_and_back(bits, wide)
    there_and_back(wide, narrow)
    assert sayable.sum() > 65_000
    assert np.array_equal(wide[sayable], wanted[sayable])
    assert np.array_equal(narrow[sayable], bits[sayable])


def test_rounding_is_pytorchs_ties_included() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    bits = np.concatenate((bits, bits & 0xFFFF0000 | 0x8000))
    values = bits.view(np.float32)
    values = values[normal(values)]
    found = np.empty(len(values), np.uint16)
    there_and_back(values, found)
    assert np.array_equal(found, torch.from_numpy(values).bfloat16().view(torch.uint16).numpy())


def test_nan_stays_nan() -> None:
    bits = np.array([0x7FFFFFFF, 0x7FFF8000, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000], np.uint32)
    found = np.empty(len(bits), np.uint16)
    there_and_back(bits.view(np.float32), found)
    assert bool(torch.from_numpy(found).view(torch.bfloat16).isnan().all())


def test_exponentials() -> None:
    x = np.linspace(-87, 88, 20_001, dtype=np.float32)
    found = np.array([cpu_kernels._exp(each) for each in x], dtype=np.float64)
    assert (np.abs(found / np.exp(x.astype(np.float64)) - 1) < 2.0**-24 * (4 + 1.5 * np.abs(x))).all()
    assert cpu_kernels._exp(np.float32(-np.inf)) < 2e-38
    assert math.isnan(cpu_kernels._exp(np.float32(np.nan)))


def test_the_largest_of_a_row_is_found(dtype: torch.dtype) -> None:
    for row in ([-3.0, -1.0, -2.0], [0.0, -0.0, 5.0, -7.0], [-math.inf, -1e30], [1.0, math.inf], [-math.inf], [-0.0]):
        values = torch.tensor(row).to(dtype)
        assert largest(cpu_kernels._rows(values)[0]) == values.max()


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = [(3, 5, 64), (2, 1, 3), (7, 33)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, beside = (torch.randn(shape).to(dtype) for _ in range(2))
    weight, share = torch.randn(shape[-1]), torch.tensor([0.3])
    for function, reference, inputs in (
        (rms_norm, rms_norm_reference, (x, weight)),
        (rms_norm_beside, rms_norm_beside_reference, (x, weight, beside, share)),
    ):
        pairs = against_fp64(lambda *a, f=function: f(*a, 1e-3), lambda *a, f=reference: f(*a, 1e-3), inputs)
        for (found, wanted), given in zip(pairs, (x, *inputs), strict=True):
            if given.shape == x.shape:
                assert_rounded(found, wanted, 2e-5)
            else:
                torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-4)


def test_what_a_norm_multiplies_by_has_its_gradient() -> None:
    x, weight = bf16(6, 32), torch.randn(32)

    def both(x: Tensor, weight: Tensor) -> Tensor:
        normed, scale = rms_norm_and_scale(x, weight, 1e-3)
        return normed * scale.to(normed.dtype).detach() + scale.to(x.dtype)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        scale = (x.square().mean(dim=-1, keepdim=True) + 1e-3).rsqrt()
        return x * scale * weight * scale.detach() + scale

    for found, wanted in against_fp64(both, reference, (x, weight)):
        assert (found.double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(3, 5, 64), (1, 2), (7, 34)], ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = 4 * torch.randn(shape).to(dtype)
    for found, wanted in against_fp64(swiglu, swiglu_reference, (x,)):
        assert_rounded(found, wanted)


def test_swiglu_far_out() -> None:
    gate = torch.tensor([-1e30, -300.0, -90.0, 90.0, 300.0, 1e30])
    x = torch.cat((gate, torch.full_like(gate, 2.0))).bfloat16()
    (out, wanted), (grad, wanted_grad) = against_fp64(swiglu, swiglu_reference, (x,))
    torch.testing.assert_close(out.double(), wanted, rtol=2 * HALF_A_PLACE, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=2 * HALF_A_PLACE, atol=1e-6)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("length", [1, 5, 64])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_causal_softmax(length: int, size: float, dtype: torch.dtype) -> None:
    scores, grad = (size * torch.randn(3, length, length)).to(dtype), torch.randn(3, length, length).to(dtype)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    wide = scores.double().requires_grad_()
    wanted = (0.3 * wide).masked_fill(mask, -math.inf).softmax(dim=-1)
    p = cpu_kernels.causal_softmax(scores, 0.3)
    assert_rounded(p, wanted.detach(), 1e-5)
    rounded = p.double()  # what the backward pass is given
    of_scores = 0.3 * rounded * (grad.double() - (rounded * grad.double()).sum(-1, keepdim=True))
    found = cpu_kernels.causal_softmax_backward(grad.clone(), p, 0.3)
    assert_rounded(found, of_scores, 1e-5)
    assert not found.masked_select(mask).any()
    assert not p.masked_select(mask).any()


@pytest.mark.usefixtures("threads")
def test_attention(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 40, width).to(dtype) for width in (16, 16, 8))
    pairs = against_fp64(lambda *a: attention(*a, 0.25), lambda *a: attention_reference(*a, 0.25), (q, k, v))
    for found, wanted in pairs:
        assert (found.double() - wanted).norm() < (0.01 if dtype == torch.bfloat16 else 1e-5) * wanted.norm()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", [6, 13])  # of a head, of which six are turned
def test_heads_turned(width: int, rows: int, dtype: torch.dtype) -> None:
    x, angles = torch.randn(2, 5, 3, width).to(dtype), 6 * torch.rand(rows, 5, 3)
    function, reference = (lambda x, f=f: f(x, angles.cos(), angles.sin()) for f in (turned, turned_reference))
    for found, wanted in against_fp64(function, reference, (x,)):
        assert_rounded(found, wanted)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("own", ["no values of their own", "a share for all", "a share for each"])
def test_keys_and_values(own: str, dtype: torch.dtype) -> None:
    kv, rope = torch.randn(2, 5, 3, 4 + 7).to(dtype), torch.randn(2, 5, 6).to(dtype)
    share = torch.randn(1) if own == "a share for all" else torch.randn(2, 5, 1)
    inputs = (kv, rope) if own.startswith("no") else (kv, rope, torch.randn(2, 5, 3 * 7).to(dtype), share)

    def joined(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda kv, rope, *own: torch.cat(function(kv, rope, 7, own or None), dim=-1)

    pairs = against_fp64(joined(keys_and_values), joined(keys_and_values_reference), inputs)
    for found, wanted in pairs:
        assert_rounded(found, wanted)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("padded", [False, True])
def test_weighted_sums_of_experts(padded: bool, dtype: torch.dtype) -> None:
    experts = torch.stack([torch.randperm(4)[:2] for _ in range(30)])
    layout = lay_out(experts, 4, padded)
    rows, weights = torch.randn(len(layout.source), 24).to(dtype), torch.rand(30, 2).to(dtype)
    pairs = against_fp64(
        lambda *a: unpermute(a[0], layout, a[1]),
        lambda *a: (a[0][layout.place] * a[1][..., None]).sum(dim=1),
        (rows, weights),
    )
    for found, wanted in pairs[1:]:
        assert_rounded(found, wanted)


@pytest.mark.usefixtures("threads")
def test_cross_entropy(dtype: torch.dtype) -> None:
    logits, targets = 5 * torch.randn(20, 100).to(dtype), torch.randint(100, (20,))
    logits[3, 7], targets[3], targets[5] = 300.0, 8, IGNORE
    wide = logits.double().requires_grad_()
    wanted = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="none")
    (of_wide,) = torch.autograd.grad(wanted.sum(), wide)
    with torch.no_grad():
        losses, error = losses_and_error(logits, targets, True)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    assert losses[3] > 250
    assert losses[5] == 0
    assert_rounded(error, of_wide)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_errors_of_sampled_logits_are_those_of_pytorch(
    share: float, groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same candidates, by hand in FP32 and by PyTorch in FP64: of the loss and of both gradients."""
    places, ids = 50, 60
    hidden, weight, targets = bf16(places, 8), bf16(ids, 8), torch.randint(ids, (places,))
    targets[4] = IGNORE
    many = torch.randint(0, 6, (places,))
    shares = torch.rand(int(many.sum())) * 0.1
    first = torch.cat((torch.zeros(1, dtype=torch.int64), many.cumsum(0)))
    row, tokens = torch.randint(9, (places,)), torch.randint(ids, (len(shares),))
    expected = Expected((torch.rand(9, ids) / ids).to(dtype), row, torch.rand(places), first, tokens, shares)
    vocabulary = by_frequency(torch.arange(ids, 0, -1), 10 if groups else ids, groups)
    told = None if share == 0 else expected
    asked = []

    def loss_and_gradients(dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = sampled_cross_entropy(*inputs, targets, vocabulary, told, share)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    errors = cpu_kernels.errors
    monkeypatch.setattr(cpu_kernels, "errors", lambda *a: asked.append(a) or errors(*a))
    found = loss_and_gradients(dtype)
    assert len(asked) == max(groups, 1)
    for each, wanted in zip(found, loss_and_gradients(torch.float64), strict=True):
        assert (each.double() - wanted).norm() < (0.01 if dtype == torch.bfloat16 else 1e-5) * wanted.norm()


# ── what is taken, and where ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["x", "beside", "weight"])
def test_nan_in_a_norm_is_nan_behind_it(where: str) -> None:
    given = {"x": bf16(2, 4), "beside": bf16(2, 4), "weight": torch.ones(4)}
    given[where][..., 1] = math.nan
    out, _ = cpu_kernels.rms_norm(given["x"], given["weight"], 1e-6, given["beside"], 0.5)
    assert bool(out[:, 1].isnan().all())


def test_nan_and_infinity_in_logits_are_not_lost() -> None:
    for value in (math.nan, math.inf):
        logits = bf16(2, 8)
        logits[0, 3] = value
        losses = cpu_kernels.cross_entropy(logits, torch.tensor([1, 1]))
        assert not losses[0].isfinite()
        assert losses[1].isfinite()
        scores = bf16(1, 4, 4)
        scores[0, 2, 1] = value
        p = cpu_kernels.causal_softmax(scores, 1.0)
        assert not p[0, 2].isfinite().all()
        assert bool(p[0, [0, 1, 3]].isfinite().all())
        gate_up = bf16(1, 8)
        gate_up[0, 2] = value
        assert not cpu_kernels.swiglu(gate_up)[0, 2].isfinite()


@torch.no_grad()
def test_only_plain_tensors_row_behind_row_are_taken(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6).to(dtype)
    assert cpu_kernels.takes(x)
    assert cpu_kernels.takes(x[1:3], x.view(2, 12))
    for other in (x.double(), x.half(), x.T, x[:, :3], x[:0], x.to("meta")):
        assert not cpu_kernels.takes(x, other)
    with torch.enable_grad():
        assert not cpu_kernels.takes(x)  # whoever differentiates twice


def test_a_column_of_a_table_is_normed_too() -> None:
    x = bf16(6, 32)[:, :16]
    assert_rounded(rms_norm(x, torch.ones(16), 1e-6), rms_norm_reference(x.double(), torch.ones(16), 1e-6))


def test_what_does_not_fit_is_refused() -> None:
    logits, x, heads = bf16(2, 8), bf16(2, 4), (bf16(1, 3, 2, 4), bf16(1, 3, 2, 2))
    for call in (
        lambda: cpu_kernels.cross_entropy(logits, torch.tensor([1, 8])),
        lambda: cpu_kernels.cross_entropy(logits, torch.tensor([1])),
        lambda: cpu_kernels.rms_norm(x, torch.ones(3), 1e-6),
        lambda: cpu_kernels.rms_norm(x, torch.ones(4), 1e-6, bf16(1, 4), 0.5),
        lambda: cpu_kernels.causal_softmax(bf16(1, 2, 4), 1.0),
        lambda: cpu_kernels.swiglu_backward(bf16(2, 4), logits[:1]),
        lambda: cpu_kernels.turned(bf16(1, 2, 3, 4), torch.ones(1, 2, 3), torch.ones(1, 2, 3)),
        lambda: cpu_kernels.turned(bf16(3, 2, 3, 4), torch.ones(2, 2, 2), torch.ones(2, 2, 2)),
        lambda: cpu_kernels.turned(bf16(1, 2, 3, 4), bf16(1, 2, 2), bf16(1, 2, 2)),
        lambda: cpu_kernels.keys_and_values(bf16(1, 2, 3, 4), bf16(1, 2, 2), 5, None, None),
        lambda: cpu_kernels.keys_and_values(bf16(1, 2, 3, 4), bf16(1, 1, 2), 2, None, None),
        lambda: cpu_kernels.keys_and_values(bf16(1, 2, 3, 4), bf16(1, 2, 2), 2, bf16(1, 2, 5), bf16(1, 2, 1)),
        lambda: cpu_kernels.keys_and_values(bf16(1, 2, 3, 4), bf16(1, 2, 2), 2, bf16(1, 2, 6), bf16(1)),
        lambda: cpu_kernels.keys_and_values_backward(*heads, bf16(1, 2, 5), bf16(1, 2, 1), 2),
        lambda: cpu_kernels.keys_and_values_backward(heads[0], heads[1][:, :, :1], None, None, 2),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            call()


def test_many_rows_are_added_up_exactly() -> None:
    """One after the other in FP32, a hundred thousand equal terms come out a thousandth off."""
    x, grad = torch.full((100_000, 1), 0.7), torch.full((100_000, 1), 0.3)
    _, scale = cpu_kernels.rms_norm(x, torch.ones(1), 1.0)
    _, of_weight, _, _ = cpu_kernels.rms_norm_backward(grad, None, x, torch.ones(1), scale)
    wanted = (grad.double() * x.double() * scale.double()).sum()
    assert abs(of_weight.item() / wanted.item() - 1) < 3e-6


FORKED = """
import os, torch
from leanseek.ops import cpu_kernels
torch.set_num_threads(2)
cpu_kernels.ENOUGH = 8
x = torch.randn(64, 64).bfloat16()
before = cpu_kernels.swiglu(x)
child = os.fork()
same = torch.equal(cpu_kernels.swiglu(x), before)
if not child:
    os._exit(not same)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not same)
"""


def test_a_forked_process_has_threads_of_its_own() -> None:
    assert subprocess.run([sys.executable, "-c", FORKED], timeout=60).returncode == 0
