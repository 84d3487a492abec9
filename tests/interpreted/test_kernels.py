"""The kernels beside FP8's under Triton's interpreter, each against FP64 and its plain twin, there and back.

In FP32 and FP16: the interpreter multiplies and rounds BF16 wrongly, and says nothing.
"""

import pytest
import torch
from torch import Tensor

from leanseek.ops import experts as reference
from leanseek.ops.heads import apply_rope
from leanseek.ops.loss import IGNORE
from leanseek.ops.triton_kernels import decode, experts, grouped, loss, rope
from tests.interpreted.grid import RAGGED, off


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ── experts ───────────────────────────────────────────────────────────────────────────────────────────────────────

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("d", "f"), [(48, 72), (15, 9), (128, 160)])
@pytest.mark.parametrize("counts", RAGGED, ids=str)
def test_grouped_linear_keeps_its_bound(
    counts: list[int], d: int, f: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    if dtype == torch.float16 and (d, f) != (48, 72):
        return
    rows, n = sum(counts), len(counts)
    x, w, grad = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((rows, d), (n, f, d), (rows, f))
    )
    out = grouped.grouped_linear(x, w, torch.tensor(counts))
    dx, dw = torch.autograd.grad(out, (x, w), grad)
    group = torch.arange(n).repeat_interleave(torch.tensor(counts))
    one = torch.nn.functional.one_hot(group, n).double() if rows else torch.zeros(0, n).double()
    for ours, k, terms in (
        (out, d, lambda g, h, v: torch.einsum("pd,pfd->pf", h, v[group])),
        (dx, f, lambda g, h, v: torch.einsum("pf,pfd->pd", g, v[group])),
        (dw, max([1, *counts]), lambda g, h, v: torch.einsum("pe,pf,pd->efd", one, g, h)),
    ):
        exact, sizes = (terms(*(each(t.detach().double()) for t in (grad, x, w))) for each in (lambda t: t, torch.abs))
        assert off(ours.detach(), exact, k * 2.0**-24 * sizes + ROUNDING[dtype] * exact.abs() + 2.0**-25) <= 1
    shifted = grouped.forward(x.detach(), w.detach().roll(1, 0), torch.tensor(counts))
    assert not rows or off(shifted, out.detach(), 1e-2) > 1  # this can fail


def test_a_neighbours_nan_stays_with_the_neighbour(generator: torch.Generator) -> None:
    counts, d, f = torch.tensor([3, 61, 5]), 40, 24  # widths that tiles reach beyond
    x, w, grad = (torch.randn(shape, generator=generator) for shape in ((69, d), (3, f, d), (69, f)))
    for each in (x, grad):
        each[3:64] = float("nan")
    w[1] = float("nan")
    for out in (grouped.forward(x, w, counts), grouped.input_gradient(grad, w, counts)):
        assert out[3:64].isnan().all()
        assert not out[:3].isnan().any()
        assert not out[64:].isnan().any()
    dw = grouped.weight_gradient(grad, x, counts)
    assert [bool(each.isnan().any()) for each in dw] == [False, True, False]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("n", "k", "n_experts", "d"), [(7, 2, 4, 48), (40, 3, 5, 1030), (1, 1, 3, 5)])
def test_rows_go_to_their_experts_and_come_back(
    n: int, k: int, n_experts: int, d: int, padded: bool, generator: torch.Generator
) -> None:
    chosen = torch.stack([torch.randperm(n_experts, generator=generator)[:k] for _ in range(n)])
    layout = reference.lay_out(chosen, n_experts, padded)
    x, weights = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((n, d), (n, k)))
    rows, theirs = experts.permute(x, layout), reference.permute(x, layout)
    assert torch.equal(rows[layout.place], theirs[layout.place])
    grad = torch.randn(rows.shape, generator=generator)
    ours, twin = (torch.autograd.grad(each, x, grad)[0] for each in (rows, theirs))
    bound = (k + 1) * 2.0**-24 * grad.double().abs()[layout.place].sum(dim=1)
    assert off(ours, grad.double()[layout.place].sum(dim=1), bound) <= 1
    assert torch.allclose(ours, twin, rtol=1e-5, atol=1e-5)

    values = torch.randn(rows.shape, generator=generator).requires_grad_()
    back = experts.unpermute(values, layout, weights)
    picked, shares = values.detach().double()[layout.place], weights.detach().double()[..., None]
    bound = (k + 1) * 2.0**-24 * (picked * shares).abs().sum(dim=1)
    assert off(back.detach(), (picked * shares).sum(dim=1), bound) <= 1
    grad = torch.randn(n, d, generator=generator)
    d_rows, d_weights = torch.autograd.grad(back, (values, weights), grad)
    by_hand = torch.zeros(rows.shape, dtype=torch.float64)
    by_hand[layout.place.flatten()] = (grad.double()[:, None] * shares).flatten(0, 1)
    assert off(d_rows, by_hand, by_hand.abs() * 2.0**-23) <= 1
    along = picked * grad.double()[:, None]
    assert off(d_weights, along.sum(dim=-1), d * 2.0**-24 * along.abs().sum(dim=-1)) <= 1


# ── the rest ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("n", "v"), [(5, 10), (3, 5000), (2, 4096), (0, 7)])
def test_losses_and_their_gradient(n: int, v: int, generator: torch.Generator) -> None:
    logits = torch.randn(n, v, generator=generator) * 20
    logits[:1, : v // 2] = float("-inf")
    targets = torch.randint(v // 2, v, (n,), generator=generator)
    targets[-1:] = IGNORE
    wide = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, targets, reduction="none", ignore_index=IGNORE)
    (error,) = torch.autograd.grad(exact.sum(), wide)
    losses, ours = loss.losses_and_error(logits.clone(), targets, gradient=True)
    log_sum, chosen = wide.detach().logsumexp(dim=1, keepdim=True), targets.clamp(min=0)[:, None]
    assert (
        off(losses, exact.detach(), 2.0**-20 * (1 + log_sum.abs() + wide.detach().gather(1, chosen).abs())[:, 0]) <= 1
    )
    size = 2.0**-22 * (2 + wide.detach().abs().nan_to_num(posinf=0) + log_sum.abs()) * (wide.detach() - log_sum).exp()
    assert off(ours, error, size.scatter_add(1, chosen, size.new_full(chosen.shape, 2.0**-23)) + 2.0**-126) <= 1
    if n > 1:
        logits[1, 0] = float("nan")
        losses, ours = loss.losses_and_error(logits.clone(), targets, gradient=True)
        assert losses.isnan().tolist() == [i == 1 and targets[1] != IGNORE for i in range(n)]
        assert ours.isnan().all(dim=1).tolist() == losses.isnan().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "heads", "width"), [(37, 3, 12), (1, 1, 64), (5, 16, 2)])
def test_rope_turns_there_and_back(
    n: int, heads: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    whole = torch.randn(n, heads, width + 6, generator=generator).to(dtype)
    x, angle = whole[..., 6:].requires_grad_(), torch.rand(n, width // 2, generator=generator) * 100
    cos, sin = angle.cos(), angle.sin()
    ours, twin = rope.rope(x, cos, sin), apply_rope(x, cos[:, None], sin[:, None])
    pairs = x.detach().double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)
    ulp = 4 * ROUNDING[dtype] * pairs
    assert off(ours.detach(), twin.detach(), ulp) <= 1
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    back = [torch.autograd.grad(each, x, grad)[0] for each in (ours, twin)]
    assert off(back[0], back[1], 4 * ROUNDING[dtype] * grad.double().abs().sum(dim=-1, keepdim=True)) <= 1
    assert torch.equal(rope.rope(x * float("nan"), cos, sin).isnan(), torch.ones_like(x, dtype=torch.bool))


def attended(q: Tensor, kept: Tensor, table: Tensor, limits: Tensor, latent: int, size: int, scale: float) -> Tensor:
    """The slow twin: query by query over the slots of its row, in FP64."""
    rows, queries, _ = q.shape
    out = torch.zeros(rows, queries, latent, dtype=torch.float64)
    for b in range(rows):
        slots = [int(page) * size + i for page in table[b] for i in range(size)]
        for i in range(queries):
            seen = kept[slots[: int(limits[b, i * limits.shape[1] // queries])]].double()
            out[b, i] = ((seen @ q[b, i].double()) * scale).softmax(dim=0) @ seen[:, :latent]
    return out


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(
    ("rows", "new", "heads", "latent", "turned", "pages"),
    [(3, 1, 4, 32, 8, 5), (2, 2, 16, 64, 16, 12), (1, 1, 5, 24, 4, 40), (2, 3, 1, 16, 2, 1), (1, 1, 70, 16, 8, 3)],
)
def test_decoding_over_pages(
    rows: int, new: int, heads: int, latent: int, turned: int, pages: int, size: int, generator: torch.Generator
) -> None:
    kept = torch.randn((1 + rows * pages) * size, latent + turned, generator=generator)
    q = torch.randn(rows, new * heads, latent + turned, generator=generator)
    table = 1 + torch.randperm(rows * pages, generator=generator).view(rows, pages)
    limits = torch.randint(1, pages * size - new + 1, (rows, 1), generator=generator) + torch.arange(new)
    limits[0] = pages * size - new + torch.arange(new)

    def ours() -> Tensor:
        return decode.latent_decode(q, kept, table, limits, heads, latent, size, 0.3, int(limits.max()))

    exact = attended(q, kept, table, limits, latent, size, 0.3)
    assert off(ours(), exact, 2.0**-17 * kept.abs().max()) <= 1
    limits[0] -= 1
    assert pages * size < 3 * new or off(ours(), exact, 2.0**-17 * kept.abs().max()) > 1  # this can fail
    limits[0] += 1
    q[-1, 0] = float("nan")
    nan = ours().isnan()
    assert nan[-1, 0].all()
    assert nan.sum() == latent
