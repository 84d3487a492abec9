"""The planner's memory of our own trainer, against every live tensor of real training steps; and its speed."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from leanseek.config import Config, read_recipe
from leanseek.plan.count import training_bytes
from leanseek.plan.memory import trainer_bytes
from leanseek.train.schedule import Knobs
from leanseek.train.setup import build
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


def measured_peak(config: Config) -> int:
    """Bytes of live tensors at the peak of a second training step of two micro-batches."""
    model, optimizers = build(config)
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


def with_changes(name: str, *changes: str) -> Config:
    return read_recipe(name, ("train.device=cpu", "train.dtype=fp32", *changes))


LAYOUTS = {
    "nano": with_changes("nano", "train.micro_batch=8"),
    "nano, few sequences": with_changes("nano", "train.micro_batch=2"),
    "nano with AdamW": with_changes("nano", "train.micro_batch=4", "optimizer.name=adamw"),
    "nano without MTP": with_changes("nano", "train.micro_batch=8", "model.num_nextn_predict_layers=0"),
    "nano in long sequences": with_changes(
        "nano", "train.micro_batch=2", "stages.0.sequence_length=1024", "model.max_position_embeddings=1024"
    ),
    "bench-20m": with_changes("bench-20m", "train.micro_batch=8"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_of_real_training_steps_is_foreseen(name: str) -> None:
    config = LAYOUTS[name]
    got, planned = measured_peak(config), trainer_bytes(config)
    moments = 1 if config.optimizer.name == "muon" else 2
    assert planned.total > training_bytes(config.model, moments)
    assert planned.total == pytest.approx(got, rel=0.10), (planned, got)  # the goal set for the planner
