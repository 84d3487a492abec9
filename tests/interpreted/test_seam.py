"""The seam with Triton behind it, under the interpreter: what a GPU would run, at shapes that a CPU can bear."""

import io

import pytest
import torch
from rich.console import Console

from leanseek.bench.kernels import _check
from leanseek.bench.workload import Case, Shapes, Work, cases
from leanseek.config import read_recipe
from leanseek.model.transformer import Transformer
from leanseek.ops import backend
from leanseek.ops.backend import PLAIN
from leanseek.serve.cache import Cache
from leanseek.serve.runner import Runner
from leanseek.train.precision import in_fp8
from leanseek.train.schedule import Knobs
from leanseek.train.setup import build
from leanseek.train.step import train_step
from tests.tiny import RECIPE

HERE = ["train.device=cpu", "train.dtype=fp32"]
TRITON = backend._triton(backend.Measured("a GPU", (), grouped_by_triton=True))
LEAST = Shapes(16, 64, 32, 2, 2, 64, 16, 16, 2, 64, (2,), ((16, 32, 64),))


def test_bench_kernels_checks_and_runs_every_kernel() -> None:
    told = io.StringIO()
    seen = []
    for case in cases(torch.device("cpu"), TRITON, LEAST):
        _check(case, Console(file=told, width=200))
        case.ours.call()
        if isinstance(case.against, Work):
            case.against.call()
        seen.append(case)
    assert [case.product for case in seen if case.product] == [("dense", 16, 32, 64), ("grouped", 32, 64, 64)]
    checked = {case.name for case in seen if case.twin is not None}
    assert all(name in told.getvalue() for name in checked)
    assert len(checked) >= 14


def test_bench_kernels_sees_a_wrong_result() -> None:
    right = torch.randn(64, generator=torch.Generator().manual_seed(0))
    wrong = Case("sums", Work(lambda: None, 1, "GB/s"), "copy", result=lambda: right * 1.1, twin=lambda: right)
    with pytest.raises(RuntimeError, match="sums: its result is off"):
        _check(wrong, Console(file=io.StringIO()))


@pytest.mark.parametrize("fp8", [False, True])
def test_a_training_step_by_triton_is_the_plain_one(fp8: bool) -> None:
    config = read_recipe(str(RECIPE), HERE)
    ids = torch.randint(config.model.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    weights, losses = [], []
    for kernels in (PLAIN, TRITON):
        model, optimizers, _ = build(config)
        model.use(kernels)
        if fp8:
            in_fp8(model)
        result = train_step(model, optimizers, ids, ids.roll(-1, 1), Knobs(1e-3, 0, 0.001, 0.3), config)
        losses.append((result.loss, result.mtp_loss, result.grad_norm))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    # In FP8 a sum in another order may move a value over the middle between two codes, a sixteenth apart.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if fp8 else 1e-5)
    # AdamW's first step is the sign of the gradient: it differs where a gradient is nothing but rounding.
    assert ((weights[0] - weights[1]).abs() > 1e-4).float().mean() < (0.05 if fp8 else 0.01)


def test_a_runner_by_triton_says_the_same() -> None:
    config = read_recipe(str(RECIPE), HERE).model
    model = Transformer(config)
    model.initialise(0.2, torch.Generator().manual_seed(0))
    told = []
    for kernels in (PLAIN, TRITON):
        model.use(kernels)
        runner, cache = Runner(model.eval()), Cache(config, 3, torch.float32, size=64)
        cache.values.normal_(generator=torch.Generator().manual_seed(1))
        for new in (2, 1):
            now = runner.at(cache.at([[1], [3]], [5, 60], [new, new]))
            told.append(runner.step(torch.arange(2 * new).view(2, -1), cache, now))
    for plain, ours in zip(told[:2], told[2:], strict=True):
        assert torch.allclose(plain, ours, rtol=1e-4, atol=1e-4)
