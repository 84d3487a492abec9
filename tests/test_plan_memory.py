"""The planner's memory of our own trainer, against every live tensor of real training steps; and its speed."""

import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from leanseek.config import Config, read_recipe
from leanseek.model.lora import adapt
from leanseek.model.transformer import Transformer
from leanseek.ops.attention import FEW_KEYS
from leanseek.plan import memory
from leanseek.plan.count import adapted_bytes, training_bytes
from leanseek.plan.estimate import STACKS, estimate
from leanseek.plan.hardware import Hardware
from leanseek.plan.layout import Layout
from leanseek.plan.memory import trainer_bytes
from leanseek.train.cpu import ready_cpu
from leanseek.train.optim import VALUES_AT_ONCE
from leanseek.train.schedule import Knobs
from leanseek.train.setup import build, ready
from leanseek.train.step import train_step


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that any operation made and nobody has dropped, once for each storage."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: object) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self.see(each)
        return out


def measured_peak(config: Config, built: tuple[Transformer, list[Optimizer]] | None = None) -> int:
    """Bytes of live tensors at the peak of a second training step of two micro-batches."""
    model, optimizers = built or build(config)[:2]
    length = config.stages[0].sequence_length
    ids = torch.randint(config.model.vocab_size, (2 * config.train.micro_batch, length))
    knobs = Knobs(learning_rate=1e-4, batch_tokens=ids.numel(), bias_speed=0.001, mtp_weight=0.3)
    train_step(model, optimizers, ids, ids.roll(-1), knobs, config)  # the moments are made here
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.see(tensor)
        for optimizer in optimizers:
            for state in optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        live.see(value)
        train_step(model, optimizers, ids, ids.roll(-1), knobs, config)
    return live.peak


PLAIN = str(Path(__file__).with_name("plain.toml"))  # V3 in small, 10.3 million parameters


def with_changes(name: str, *changes: str) -> Config:
    return read_recipe(name, ("train.device=cpu", "train.dtype=fp32", *changes))


LAYOUTS = {
    "nano": with_changes(PLAIN, "train.micro_batch=4"),
    "nano, one sequence": with_changes(PLAIN, "train.micro_batch=1"),
    "nano with AdamW": with_changes(PLAIN, "train.micro_batch=2", "optimizer.name=adamw"),
    "nano without MTP": with_changes(PLAIN, "train.micro_batch=4", "model.num_nextn_predict_layers=0"),
    "nano in long sequences": with_changes(
        PLAIN, "train.micro_batch=1", "stages.0.sequence_length=1024", "model.max_position_embeddings=1024"
    ),
    "nano whose tokens bring": with_changes(
        PLAIN, "train.micro_batch=4", "model.value_embeddings=true", "model.embedding_shares=true"
    ),
    "bench-20m": with_changes("bench-20m", "train.micro_batch=4"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_of_real_training_steps_is_foreseen(name: str) -> None:
    config = LAYOUTS[name]
    got, planned = measured_peak(config), trainer_bytes(config)
    moments = 1 if config.optimizer.name == "muon" else 2
    assert planned.total > training_bytes(config.model, moments)
    assert planned.total == pytest.approx(got, rel=0.10), (planned, got)  # the goal set for the planner


def test_the_planner_knows_what_the_trainer_holds_at_once() -> None:
    assert (memory.AT_ONCE, memory.SUPPORTS) == (VALUES_AT_ONCE, FEW_KEYS)


ADAPTED = ("optimizer.name=adamw", "lora.rank=8", "lora.base=int8")


@pytest.mark.parametrize(
    "changes", [(PLAIN, "train.micro_batch=4"), ("bench-20m", "train.micro_batch=2", "lora.experts=true")]
)
def test_memory_with_adapters_is_foreseen_to_a_quarter(changes: tuple[str, ...]) -> None:
    config = with_changes(*changes, *ADAPTED)
    assert config.lora is not None
    own = build(config.model_copy(update={"lora": None}))[0].state_dict()
    with torch.device("meta"):
        model = Transformer(config.model)
    adapt(model, config.lora, lambda name: (own[name].clone(), None), torch.Generator())
    got, planned = measured_peak(config, ready(config, model)[:2]), trainer_bytes(config)
    assert planned.total == pytest.approx(got, rel=0.25), (planned, got)
    assert planned.total - planned.activations == adapted_bytes(config.model, config.lora, 4)


# ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────────

RUNS = {
    "nano": with_changes(PLAIN, "train.micro_batch=4"),
    "nano with AdamW": with_changes(PLAIN, "train.micro_batch=4", "optimizer.name=adamw"),
    "nano in long sequences": with_changes(
        PLAIN, "train.micro_batch=1", "stages.0.sequence_length=1024", "model.max_position_embeddings=1024"
    ),
    "more and more active experts": with_changes(
        PLAIN, "train.micro_batch=4", "model.n_routed_experts=32", "model.num_experts_per_tok=4"
    ),
    "dense": with_changes(
        PLAIN, "train.micro_batch=4", "model.first_k_dense_replace=4", "model.num_nextn_predict_layers=0"
    ),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    ready_cpu()  # as a run does
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cpu_seconds(work: Callable[[], object], rounds: int) -> float:
    """CPU time and not the clock's: what else runs on the machine takes turns with us, and is not counted."""
    begun = time.process_time()
    for _ in range(rounds):
        work()
    return (time.process_time() - begun) / rounds


def this_machine() -> Hardware:
    """Peak and copy rate of one core in FP32; the planner counts two bytes a value, so the rate is halved."""
    x = torch.randn(1024, 1024)
    flops = 2 * 1024**3 / cpu_seconds(lambda: x @ x, 8)
    long = torch.ones(1 << 24)
    there = long.clone()
    moved = 2 * long.numel() * 4 / cpu_seconds(lambda: there.copy_(long), 8)
    return Hardware("here", flops / 1e12, None, 64, moved / 2 / 1e9, 1, 0, 1, 1, 1)


def planned_over_measured(config: Config) -> float:
    """CPU seconds of a training step of two micro-batches, as planned for the machine as it is now ÷ as they are.

    Caches and a core's second thread are shared with whoever else runs there, who comes and goes: the machine is
    measured right before each step, as long as it takes to suffer as a step does, and the middle of five pairs counts.
    """
    model, optimizers, _ = build(config)
    length, rows = config.stages[0].sequence_length, config.train.micro_batch
    ids = torch.randint(config.model.vocab_size, (2 * rows, length))
    knobs = Knobs(learning_rate=1e-4, batch_tokens=ids.numel(), bias_speed=0.001, mtp_weight=0.3)
    layout = Layout(1, micro_batch=rows, batch=2 * rows, length=length, muon=config.optimizer.name == "muon")

    def step() -> None:
        train_step(model, optimizers, ids, ids.roll(-1), knobs, config)

    def pair() -> float:
        planned = estimate(config.model, layout, this_machine(), STACKS["leanseek"]).step.seconds
        return planned / cpu_seconds(step, 1)

    step()
    return median(pair() for _ in range(5))


def test_time_of_real_training_steps_is_foreseen(one_thread: None) -> None:
    errors = {name: planned_over_measured(config) - 1 for name, config in RUNS.items()}
    assert len(errors) == 5
    assert median(map(abs, errors.values())) <= 0.20, errors  # the goal set for the planner
    assert max(map(abs, errors.values())) <= 0.60, errors  # no single one is far out, even on a busy machine
