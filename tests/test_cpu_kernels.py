"""The CPU's kernels, each against what PyTorch makes of the same values in FP64."""

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from leanseek.ops.loss import IGNORE, losses_and_error
from leanseek.ops.sampled import Expected, by_frequency, sampled_cross_entropy

HALF_A_PLACE = 2.0**-8  # of BF16, relative, at the most


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "ENOUGH", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def assert_rounded(found: Tensor, wanted: Tensor, absolute: float = 1e-6) -> None:
    """found in BF16 is what wanted in FP64 rounds to, but for errors of FP32 `absolute` to the largest value."""
    slack = HALF_A_PLACE * wanted.abs() * 1.001 + absolute * wanted.abs().max()
    assert found.dtype == torch.bfloat16
    assert bool(((found.double() - wanted).abs() <= slack).all())


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    out = function(*(x.requires_grad_() for x in inputs))
    return out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))


def against_fp64(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> list[tuple[Tensor, Tensor]]:
    """Result and gradients of a function, beside those of its reference in FP64."""
    grad = bf16(*function(*inputs).shape)
    found = gradients(function, tuple(x.clone() for x in inputs), grad)
    return list(zip(found, gradients(reference, tuple(x.double() for x in inputs), grad), strict=True))


def normal(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """All but NaN and numbers so small that a process may take them for zero."""
    size = values.view(np.uint32) & 0x7FFFFFFF
    return (size == 0) | ((size >= 1 << 23) & (size <= 255 << 23))


# ── a value ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_value_of_bf16_is_widened_and_rounded_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    sayable = normal(wide)
    for each, value in zip(bits[sayable], wide[sayable], strict=True):
        assert cpu_kernels._wide(each) == value
        assert cpu_kernels._narrow(value) == each


def test_rounding_is_pytorchs_ties_included() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    bits = np.concatenate((bits, bits & 0xFFFF0000 | 0x8000))
    values = bits.view(np.float32)
    values = values[normal(values) & np.isfinite(values)]
    wanted = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert [cpu_kernels._narrow(value) for value in values] == wanted.tolist()


def test_exponentials_are_exact_to_fp32s_last_places() -> None:
    x = np.linspace(-87, 88, 20_001, dtype=np.float32)
    found = np.array([cpu_kernels._exp(each) for each in x], dtype=np.float64)
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 6 * 2.0**-24
    assert cpu_kernels._exp(np.float32(-np.inf)) < 2e-38
    assert math.isnan(cpu_kernels._exp(np.float32(np.nan)))


def test_the_largest_of_a_row_is_found() -> None:
    for row in ([-3.0, -1.0, -2.0], [0.0, -0.0, 5.0, -7.0], [-math.inf, -1e30], [1.0, math.inf], [-math.inf]):
        bits = torch.tensor(row).bfloat16().view(torch.uint16).numpy()
        assert cpu_kernels._largest(bits) == torch.tensor(row).bfloat16().max()


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = [(3, 5, 64), (2, 1, 3), (7, 33)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape: tuple[int, ...]) -> None:
    x, weight, beside, share = 3 * bf16(*shape), torch.randn(shape[-1]), bf16(*shape), torch.tensor([0.3])
    for function, reference, inputs in (
        (rms_norm, rms_norm_reference, (x, weight)),
        (rms_norm_beside, rms_norm_beside_reference, (x, weight, beside, share)),
    ):
        pairs = against_fp64(lambda *a, f=function: f(*a, 1e-3), lambda *a, f=reference: f(*a, 1e-3), inputs)
        for (found, wanted), given in zip(pairs, (x, *inputs), strict=True):
            if given.dtype == torch.bfloat16:
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
def test_swiglu(shape: tuple[int, ...]) -> None:
    x = 4 * bf16(*shape)
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
def test_causal_softmax(length: int, size: float) -> None:
    scores, grad = size * bf16(3, length, length), bf16(3, length, length)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    wide = scores.double().requires_grad_()
    wanted = (0.3 * wide).masked_fill(mask, -math.inf).softmax(dim=-1)
    p = cpu_kernels.causal_softmax(scores, 0.3)
    assert_rounded(p, wanted.detach())
    rounded = p.double()  # what the backward pass is given
    of_scores = 0.3 * rounded * (grad.double() - (rounded * grad.double()).sum(-1, keepdim=True))
    found = cpu_kernels.causal_softmax_backward(grad.clone(), p, 0.3)
    assert_rounded(found, of_scores, 1e-5)
    assert not found.masked_select(mask).any()
    assert not p.masked_select(mask).any()


@pytest.mark.usefixtures("threads")
def test_attention() -> None:
    q, k, v = bf16(2, 3, 40, 16), bf16(2, 3, 40, 16), bf16(2, 3, 40, 8)
    pairs = against_fp64(lambda *a: attention(*a, 0.25), lambda *a: attention_reference(*a, 0.25), (q, k, v))
    for found, wanted in pairs:
        assert (found.double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("padded", [False, True])
def test_weighted_sums_of_experts(padded: bool) -> None:
    experts = torch.stack([torch.randperm(4)[:2] for _ in range(30)])
    layout = lay_out(experts, 4, padded)
    rows, weights = bf16(len(layout.source), 24), torch.rand(30, 2).bfloat16()
    pairs = against_fp64(
        lambda *a: unpermute(a[0], layout, a[1]),
        lambda *a: (a[0][layout.place] * a[1][..., None]).sum(dim=1),
        (rows, weights),
    )
    for found, wanted in pairs[1:]:
        assert_rounded(found, wanted)


@pytest.mark.usefixtures("threads")
def test_cross_entropy() -> None:
    logits, targets = 5 * bf16(20, 100), torch.randint(100, (20,))
    logits[3, 7], targets[3], targets[5] = 300.0, 8, IGNORE
    wide = logits.double().requires_grad_()
    wanted = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="none")
    (of_wide,) = torch.autograd.grad(wanted.sum(), wide)
    losses, error = losses_and_error(logits, targets, True)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    assert losses[3] > 250
    assert losses[5] == 0
    assert_rounded(error, of_wide)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_errors_of_sampled_logits_are_those_of_pytorch(
    share: float, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same candidates, by hand in FP32 and by PyTorch in FP64: of the loss and of both gradients."""
    places, ids = 50, 60
    hidden, weight, targets = bf16(places, 8), bf16(ids, 8), torch.randint(ids, (places,))
    targets[4] = IGNORE
    many = torch.randint(0, 6, (places,))
    shares = torch.rand(int(many.sum())) * 0.1
    first = torch.cat((torch.zeros(1, dtype=torch.int64), many.cumsum(0)))
    row, tokens = torch.randint(9, (places,)), torch.randint(ids, (len(shares),))
    expected = Expected(torch.rand(9, ids).bfloat16() / ids, row, torch.rand(places), first, tokens, shares)
    vocabulary = by_frequency(torch.arange(ids, 0, -1), 10 if groups else ids, groups)
    told = None if share == 0 else expected
    asked = []

    def loss_and_gradients(dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = sampled_cross_entropy(*inputs, targets, vocabulary, told, share)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    errors = cpu_kernels.errors
    monkeypatch.setattr(cpu_kernels, "errors", lambda *a: asked.append(a) or errors(*a))
    found = loss_and_gradients(torch.bfloat16)
    assert len(asked) == max(groups, 1)
    for each, wanted in zip(found, loss_and_gradients(torch.float64), strict=True):
        assert (each.double() - wanted).norm() < 0.01 * wanted.norm()


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


def test_only_plain_bf16_row_behind_row_is_taken() -> None:
    x = bf16(4, 6)
    assert cpu_kernels.takes(x)
    assert cpu_kernels.takes(x[1:3], x.view(2, 12))
    for other in (x.float(), x.T, x[:, :3], x[:0], x.to("meta")):
        assert not cpu_kernels.takes(x, other)


def test_a_column_of_a_table_is_normed_too() -> None:
    x = bf16(6, 32)[:, :16]
    assert_rounded(rms_norm(x, torch.ones(16), 1e-6), rms_norm_reference(x.double(), torch.ones(16), 1e-6))


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
