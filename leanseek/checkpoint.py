"""The run folder: its anatomy, its lock, and checkpoints that survive a kill at any moment.

    RUN/config.toml                     the resolved configuration
        run.json                        format version, place and fingerprint of the data, whether it chats
        tokenizer/
        released/                       of an imported model: what came with it and is no weight
        metrics.jsonl  receipt.json  spent.json
        checkpoints/step-00000120/      model/*.safetensors, optimizer/*.safetensors + groups.json, state.json,
                                        checksums.json; ema/*.safetensors where averages are kept

Tensors go through torch DCP into safetensors, everything else into JSON: loading never unpickles. A checkpoint is
written under a name that starts with a dot, checksummed, flushed to the disk and only then renamed, so a folder called
`step-…` was whole when it got its name, and its checksums tell of damage done later.

Files hold whole tensors, whatever mesh wrote them: each rank puts some together and writes them, and reads the rows it
wants. So any mesh goes on with what any other saved, and one process reads it all.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
from torch.optim import Optimizer

from leanseek.config import BadInput, Config, LoraConfig, ModelConfig, differences, read_config, to_toml
from leanseek.model.lora import merge
from leanseek.model.transformer import Transformer
from leanseek.ops.fp8 import SCALE, dequantise
from leanseek.parallel.mesh import ALONE, Ranks, everyones, lead
from leanseek.parallel.parts import Part, gathered, local, parts
from leanseek.parallel.tensor import cut, share
from leanseek.weightfiles import Stored, open_folder

FORMAT_VERSION = 1
IMPORTED = Path("checkpoints/step-00000000/model")  # where the weights of an imported run are
FILE_BYTES = 1 << 29  # a weight file is assembled in memory: large models are split into files of about this size

# what the same run may be continued with: none of it changes a single weight
FREE_KEYS = (
    "max_steps",
    "max_seconds",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_every",
    "background_saves",
    "recompute",
)
FROZEN_WHEN_AUTO = ("dtype", "device")


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold RUN for this process; the system lets go of it when the process ends, however it ends. Raises BadInput."""
    _make_folder(run)
    with (run / ".lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{run} is in use by another process: wait for it or take another folder") from None
        yield


def check_run(run: Path, config: Config, data_fingerprint: str) -> Config | None:
    """The configuration to go on with when RUN already holds this very run, None when RUN is new or only imported.

    The answer is the stored configuration with the asked price, mesh and values of FREE_KEYS; `auto` asks for whatever
    the run froze. Raises BadInput when RUN holds another configuration, other data, or is a folder of something else.
    """
    if not (run / "run.json").is_file():
        if run.is_dir() and any(entry.name not in (".lock", ".writing-run.json") for entry in run.iterdir()):
            raise BadInput(f"{run}: a folder with other things in it, not a run: take a new or empty folder")
        return None
    stored_fingerprint = _run_facts(run).get("data_fingerprint")
    if not (run / "config.toml").is_file():
        return None  # creation was interrupted: config.toml comes last
    stored = read_config(run / "config.toml")
    config = config.model_copy(update={"model": _as_released(config.model, stored.model)})
    if stored_fingerprint is None:  # an import that nobody has trained: its model is given, the rest is still open
        if config.model != stored.model:
            raise BadInput(f"{run} holds an imported model of another shape: take {run / 'config.toml'} for a recipe")
        return None
    free = {key: getattr(config.train, key) for key in FREE_KEYS}
    frozen = {key: getattr(stored.train, key) for key in FROZEN_WHEN_AUTO if getattr(config.train, key) == "auto"}
    priced = {"description": config.description, "cost": config.cost, "mesh": config.mesh}
    merged = stored.model_copy(update={**priced, "train": stored.train.model_copy(update=free)})
    wanted = config.model_copy(update={"train": config.train.model_copy(update=frozen)})
    if found := differences(merged, wanted):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise BadInput(
            f"{run} holds another config (its value, yours): {'; '.join(found[:3])}{more}: take a new folder"
        )
    if stored_fingerprint != data_fingerprint:
        raise BadInput(f"{run} was begun on other data: give the data it began with or take a new folder")
    return merged


def create_run(
    run: Path,
    config: Config,
    data_fingerprint: str,
    tokenizer: Path,
    data: Path,
    chats: bool = False,
    begun_with: Path | None = None,
    scores: bool = False,
) -> None:
    """Make RUN hold `config`, a copy of the tokenizer's folder, the place of its data and an empty `checkpoints/`.

    `chats` says that the run was taught to answer: a prompt then goes through the chat template unless asked raw.
    `scores` says that it is a reward model. `begun_with` is the run whose weights it starts from: what came with those
    when they were imported comes along, and where RUN is to hold adapters, which checkpoint they belong to is noted.
    """
    _make_folder(run)
    if is_import(run):  # has its tokenizer; until its data are noted, last, it may be begun otherwise
        _write_whole(run / "config.toml", to_toml(config).encode())
        _write_facts(run, data_fingerprint, str(data.absolute()), chats)
        return
    base = None
    if config.lora is not None and begun_with is not None:
        found = newest(begun_with, lambda _: None)
        assert found is not None
        base = {"checkpoint": str(found.path.absolute()), "sha256": _digest(found.path / "checksums.json")}
    _write_facts(run, data_fingerprint, str(data.absolute()), chats, scores, base)
    _make_folder(run / "checkpoints")
    shutil.copytree(tokenizer, run / "tokenizer", dirs_exist_ok=True)
    if begun_with is not None and (begun_with / "released").is_dir():
        shutil.copytree(begun_with / "released", run / "released", dirs_exist_ok=True)
    _write_whole(run / "config.toml", to_toml(config).encode())  # last: a run with a configuration is complete


def create_import(run: Path, config: Config, chats: bool) -> None:
    """Make a run of a folder that has a tokenizer, and weights at IMPORTED: they become the checkpoint of step 0."""
    _write_facts(run, None, None, chats)
    checkpoint = (run / IMPORTED).parent
    (checkpoint / "state.json").write_bytes(_json({}))
    _seal(checkpoint, 0, {})
    _write_whole(run / "config.toml", to_toml(config).encode())


def is_import(run: Path) -> bool:
    """Whether the newest checkpoint of RUN is an import's, which has weights but was never trained here."""
    found = _found(run / "checkpoints")
    return bool(found) and not (found[0].path / "optimizer").exists()


def read_run(run: Path) -> Config:
    """The configuration of an existing run. Raises BadInput."""
    if not (run / "run.json").is_file() or not (run / "config.toml").is_file():
        raise BadInput(f"{run}: not a run: there is no run.json with a config.toml in it")
    _run_facts(run)
    return read_config(run / "config.toml")


def data_of(run: Path) -> Path:
    """The data folder an existing run was trained on, as it was called then. Raises BadInput."""
    read_run(run)
    data = _run_facts(run)["data"]
    if data is None:
        raise BadInput(f"{run}: was imported and has no data of its own: give --text")
    return Path(data)


def remember_data(run: Path, data: Path) -> None:
    """Notes where an existing run's data are now, which may have moved."""
    facts = _run_facts(run)
    if facts["data"] != str(data.absolute()):
        write_json(run / "run.json", {**facts, "data": str(data.absolute())})


def chats(run: Path) -> bool:
    """Whether an existing run was taught to answer in chats. Raises BadInput."""
    read_run(run)
    return bool(_run_facts(run)["chats"])


def scores(run: Path) -> bool:
    """Whether an existing run is a reward model, which scores chats and says nothing. Raises BadInput."""
    read_run(run)
    return bool(_run_facts(run).get("scores"))


def cut_metrics(run: Path, step: int, validated: int | None) -> dict[str, float]:
    """Cut metrics.jsonl back to `step`, its validations back to step `validated`; a half-written line goes as well.

    Returns the largest `seconds`, `cpu_seconds` and `flops` of all lines, removed ones included, so that lost work is
    billed; they are kept in spent.json, or a run killed twice would forget the first loss. 0 where no line has one.
    """
    last_validation = -1 if validated is None else validated
    path, remembered = run / "metrics.jsonl", run / "spent.json"
    spent = dict.fromkeys(("seconds", "cpu_seconds", "flops"), 0.0)
    if remembered.exists():
        spent |= json.loads(remembered.read_bytes())
    whole, kept = path.read_bytes() if path.exists() else b"", []
    for line in whole.splitlines():
        try:
            row = json.loads(line)
            at = row["step"]
        except (ValueError, KeyError, TypeError):
            continue
        spent = {key: max(most, row.get(key, 0.0)) for key, most in spent.items()}
        if at <= (step if "loss" in row else last_validation):
            kept.append(line + b"\n")
    if b"".join(kept) != whole:
        write_json(remembered, spent)
        _write_whole(path, b"".join(kept))
    return spent


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int

    @property
    def model(self) -> Path:
        """The folder with the weights, for `load_model_weights`."""
        return self.path / "model"

    def weights(self, averaged: bool) -> Path:
        """The folder with the weights, or with their moving average. Raises BadInput where none was kept."""
        if not averaged:
            return self.model
        if not (self.path / "ema").is_dir():
            raise BadInput(f"{self.path}: no average of the weights was kept: train with train.ema_decay=0.999")
        return self.path / "ema"

    def state(self) -> dict[str, Any]:
        """What `save` was given as `state`."""
        state: dict[str, Any] = json.loads((self.path / "state.json").read_bytes())
        return state


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizers: list[Optimizer],
    state: dict[str, Any],
    keep: int,
    ranks: Ranks = ALONE,
    average: dict[str, Tensor] | None = None,
) -> Path:
    """Write RUN/checkpoints/step-… and remove all but the newest `keep`; returns the new folder.

    Weights keep each tensor's dtype, persistent buffers included; `average` is of the weights, by name. `state` is
    anything JSON can hold. Checkpoints of later steps are removed too: the run has turned back past them. Raises
    OSError (a full disk, no permission); the earlier checkpoints then stand as before.
    """
    saver = Saver(run, keep, ranks)
    saver.save(step, model, optimizers, state, average)
    return run / "checkpoints" / f"step-{step:08d}"


class Saver:
    """Saves the checkpoints of a run, `beside` the training where asked: the steps go on while files are written.

    What is saved is copied first, so later steps do not touch it. A checkpoint has its name only when it is whole; one
    that was begun waits for the one before, and `wait` for the last. An error of the writing is raised by the next
    call.
    """

    def __init__(self, run: Path, keep: int, ranks: Ranks = ALONE, beside: bool = False) -> None:
        self.run, self.keep, self.ranks = run, keep, ranks
        self.thread = ThreadPoolExecutor(1) if beside else None
        self.writing: Future[None] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: list[Optimizer],
        state: dict[str, Any],
        average: dict[str, Tensor] | None = None,
    ) -> None:
        """As the function `save`."""
        self.wait()
        own, beside = parts(model, self.ranks), self.thread is not None
        moments, parts_of_moments, described = _optimizer_state(model, optimizers, own)
        folders = {
            "model": gathered(model.state_dict(), own, self.ranks, copied=beside),
            "optimizer": gathered(moments, parts_of_moments, self.ranks, copied=beside),
        }
        if average is not None:
            folders["ema"] = gathered(average, own, self.ranks, copied=beside)
        described = _joined_stages(self.ranks.told(described, "pp"))
        content = _Content(step, folders, {"optimizer/groups.json": _json(described), "state.json": _json(state)})
        if self.thread is None:
            _write(self.run, content, self.keep, self.ranks)
        else:
            self.writing = self.thread.submit(_write, self.run, content, self.keep, self.ranks)

    def wait(self) -> None:
        """Until the newest checkpoint has its name. Raises OSError."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()


@dataclass(frozen=True)
class _Content:
    step: int
    folders: dict[str, dict[str, Tensor]]  # the whole tensors that this rank writes
    files: dict[str, bytes]


def _write(run: Path, content: _Content, keep: int, ranks: Ranks) -> None:
    """Each rank its tensors; the first one all else, and the name."""
    folder = run / "checkpoints"
    name = f"step-{content.step:08d}"
    writing, target = folder / f".writing-{name}", folder / name

    def begin() -> None:
        _make_folder(folder)
        _remove_leftovers(folder)
        writing.mkdir()

    def finish() -> None:
        for file, text in content.files.items():
            (writing / file).parent.mkdir(exist_ok=True)
            (writing / file).write_bytes(text)
        _seal(writing, content.step, digests)
        if target.exists():  # saved again at the same step: the old one stays findable until the new one has its name
            _remove(folder / f"{name}.old")
            target.rename(folder / f"{name}.old")
        writing.rename(target)
        _flush(folder)
        earlier = [found for found in _found(folder) if found.step < content.step]
        for other in [found for found in _found(folder) if found not in earlier[: keep - 1] and found.path != target]:
            _remove(other.path)

    try:
        lead(begin, ranks.files)
        written = [
            path for name, tensors in content.folders.items() for path in _write_tensors(writing / name, tensors, ranks)
        ]
        digests: dict[str, dict[str, Any]] = {}
        for found in everyones({path.relative_to(writing).as_posix(): _summed(path) for path in written}, ranks.files):
            digests |= found
        lead(finish, ranks.files)
    except BaseException:
        if ranks.first:
            shutil.rmtree(writing, ignore_errors=True)
        raise


def save_weights(folder: Path, model: nn.Module, ranks: Ranks = ALONE) -> None:
    """Write weights alone, for `load_model_weights`; the folder has its name only when it is whole. Raises OSError."""
    writing = folder.with_name(f".writing-{folder.name}")

    def begin() -> None:
        _remove(writing)
        _make_folder(writing)

    def finish() -> None:
        _remove(folder)
        writing.rename(folder)

    lead(begin, ranks.files)
    _write_tensors(writing, gathered(model.state_dict(), parts(model, ranks), ranks), ranks)
    everyones(None, ranks.files)  # all have written
    lead(finish, ranks.files)


def newest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as written, None when there is none at all.

    A damaged one is named through `warn`, in one line, and the one before is taken. Raises BadInput when all are
    damaged.
    """
    found = _found(run / "checkpoints")
    for checkpoint in found:
        damage = _damage(checkpoint)
        if damage is None:
            return checkpoint
        warn(f"{checkpoint.path}: {damage}: trying the checkpoint before")
    if found:
        raise BadInput(f"{run}: none of its {len(found)} checkpoints is whole: start again in a new folder")
    return None


def load_newest(run: Path, model: Transformer) -> None:
    """Fill `model` with the newest weights of RUN, whatever they are stored in, adapters merged. Raises BadInput."""
    load_weights(newest_weights(run), model)


@dataclass(frozen=True)
class Weights:
    """The newest weights of a run: the folder they are in, or that of its base and the adapters beside those."""

    folder: Path
    adapters: dict[str, Stored]
    lora: LoraConfig | None


def newest_weights(run: Path, averaged: bool = False) -> Weights:
    """The newest weights of RUN, or their moving average.

    Raises BadInput where RUN has no whole checkpoint, or no average, and where the base of its adapters is gone or
    another.
    """
    found = newest(run, lambda line: print(f"warning: {line}", file=sys.stderr))
    if found is None:
        raise BadInput(f"{run}: has no checkpoint yet: train it first")
    folder = found.weights(averaged)
    if "base" not in _run_facts(run):
        return Weights(folder, {}, None)
    return Weights(base_of(run), open_folder(folder), read_config(run / "config.toml").lora)


def load_weights(weights: Weights, model: Transformer, ranks: Ranks = ALONE) -> None:
    """Fill `model`, or a rank's part of it, with `weights`, adapters merged. Raises BadInput."""
    if weights.lora is not None and ranks.world > 1:
        raise BadInput(f"{weights.folder}: has adapters, which one process merges: export the run and import that")
    load_model_weights(weights.folder, model, ranks=ranks)
    if weights.lora is not None:
        merge(model, {name: stored.read() for name, stored in weights.adapters.items()}, weights.lora)


def base_of(run: Path) -> Path:
    """The folder with the weights that RUN's adapters belong to. Raises BadInput where it is gone or another."""
    base = _run_facts(run)["base"]
    its = Path(base["checkpoint"])
    if not (its / "checksums.json").is_file() or _digest(its / "checksums.json") != base["sha256"]:
        raise BadInput(f"{run}: holds adapters of {its}, which is no longer there as it was: bring it back")
    return its / "model"


def load(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizers: list[Optimizer],
    ranks: Ranks = ALONE,
    average: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Bring model and optimizers, in place, to the bits they were saved with; returns `state`. Raises BadInput.

    An import has weights only, in a precision of its own: the optimizers begin anew. An `average` that was not saved
    begins with the weights.
    """
    trained = (checkpoint.path / "optimizer").exists()
    load_model_weights(checkpoint.model, model, same_dtype=trained, ranks=ranks)
    if trained:
        _load_optimizers(checkpoint.path / "optimizer", model, optimizers, ranks)
    if average is not None:
        folder = checkpoint.path / "ema"
        _read_parts(folder if folder.is_dir() else checkpoint.model, average, parts(model, ranks))
    return checkpoint.state()


def load_model_weights(folder: Path, model: nn.Module, same_dtype: bool = False, ranks: Ranks = ALONE) -> None:
    """Fill the model, in place, from the safetensors files of a folder; other files there are not opened.

    Values are converted to the model's dtypes unless `same_dtype` asks that they agree. Raises BadInput naming tensors
    that are missing, not the model's, or of another shape or dtype; the model is then untouched.
    """
    target, own = model.state_dict(), parts(model, ranks)
    stored = open_folder(folder)
    _refuse(folder, "missing", [name for name in target if name not in stored])
    known = set().union(*ranks.told(set(target), "pp"))
    _refuse(folder, "unexpected", [name for name in stored if name.removesuffix(SCALE) not in known])
    shapes = [(name, stored[name].shape, own[name].shape) for name in target]
    _refuse(folder, "wrong shape of", [f"{name} ({list(a)}, here {list(b)})" for name, a, b in shapes if a != b])
    if same_dtype:
        dtypes = [(name, stored[name].dtype, target[name].dtype) for name in target]
        _refuse(folder, "wrong dtype of", [f"{name} ({a}, here {b})" for name, a, b in dtypes if a != b])
    _read_parts(folder, target, own)


def load_shares(folder: Path, model: nn.Module, rank: int, ways: int) -> None:
    """Fill a model cut by `parallel.tensor`, in place, with a rank's shares of the tensors of a folder.

    Memory holds the model and one matrix. Raises BadInput as `load_model_weights` does, before anything is filled.
    """
    target, stored = model.state_dict(), open_folder(folder)
    _refuse(folder, "missing", [name for name in target if name not in stored])
    known = {*target, *(name + SCALE for name in target)}
    _refuse(folder, "unexpected", [name for name in stored if name not in known])
    for name, tensor in target.items():
        shape = list(tensor.shape)
        if how := cut(name):
            shape[how[0]] *= ways
        if shape != list(stored[name].shape):
            _refuse(folder, "wrong shape of", [f"{name} ({list(stored[name].shape)}, here {shape})"])
    for name, tensor in target.items():
        matrices = [tensor] if tensor.dim() < 3 else [each[None] for each in tensor]
        for index, matrix in enumerate(matrices):
            values = stored[name].read(index, len(matrices))
            if scales := stored.get(name + SCALE):
                own = scales.read(index, len(matrices))
                values = dequantise(values, own.view(-1, *scales.shape[-2:]) if len(scales.shape) == 3 else own)
            values = values.view(1, *values.shape[-2:]) if tensor.dim() == 3 else values
            matrix.copy_(share(name, values, rank, ways))


# ── optimizers: state by parameter name ───────────────────────────────────────────────────────────────────────────
# torch's own state-dict functions cast moments to the parameter's dtype and take a step with zero gradients to make
# room for them; written out by name nothing is cast, nothing steps, and what has no state yet has none afterwards.


def _optimizer_state(
    model: nn.Module, optimizers: list[Optimizer], own: dict[str, Part]
) -> tuple[dict[str, Tensor], dict[str, Part], list[dict[str, Any]]]:
    """The tensors of the state, which part of them this rank has, and the rest of it for JSON."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    parts_of: dict[str, Part] = {}
    described = []
    for index, optimizer in enumerate(optimizers):
        groups = []
        for group in optimizer.param_groups:
            settings = {key: value for key, value in group.items() if key != "params"}
            groups.append({"settings": settings, "params": [names[parameter] for parameter in group["params"]]})
        state: dict[str, dict[str, Any]] = {}
        for parameter, values in optimizer.state.items():
            name = names[parameter]
            state[name] = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensor = f"{index}.{name}.{key}"
                    state[name][key] = {"tensor": tensor}
                    alike = value.shape == parameter.shape
                    tensors[tensor], parts_of[tensor] = value, own[name] if alike else Part(0, 1, tuple(value.shape))
        described.append({"groups": groups, "state": state})
    return tensors, parts_of, described


def _joined_stages(stages: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The descriptions of the optimizers of several stages as those of one model's."""
    whole = stages[0]
    for stage in stages[1:]:
        for ours, theirs in zip(whole, stage, strict=True):
            for group, more in zip(ours["groups"], theirs["groups"], strict=True):
                group["params"] += [name for name in more["params"] if name not in group["params"]]
            ours["state"] |= theirs["state"]
    return whole


def _load_optimizers(folder: Path, model: nn.Module, optimizers: list[Optimizer], ranks: Ranks) -> None:
    parameters = dict(model.named_parameters())
    own, names = parts(model, ranks), {parameter: name for name, parameter in parameters.items()}
    described = json.loads((folder / "groups.json").read_bytes())
    ours = [[[names[p] for p in group["params"]] for group in optimizer.param_groups] for optimizer in optimizers]
    stages = ranks.told(ours, "pp")
    whole = [[set().union(*named) for named in zip(*groups, strict=True)] for groups in zip(*stages, strict=True)]
    if whole != [[set(group["params"]) for group in saved["groups"]] for saved in described]:
        raise BadInput(f"{folder}: was saved by other optimizers or with the parameters grouped otherwise")
    stored = open_folder(folder) if any(folder.glob("*.safetensors")) else {}
    for optimizer, saved in zip(optimizers, described, strict=True):
        optimizer.state.clear()
        on_device: set[Tensor] = set()
        for group, saved_group in zip(optimizer.param_groups, saved["groups"], strict=True):
            for key, value in saved_group["settings"].items():
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
            if group.get("fused") or group.get("capturable"):
                on_device.update(group["params"])
        for name, values in saved["state"].items():
            if name not in parameters:
                continue  # another stage's
            parameter = parameters[name]
            restored = optimizer.state[parameter]
            for key, value in values.items():
                if not isinstance(value, dict):
                    restored[key] = value
                    continue
                entry = stored[value["tensor"]]
                if entry.shape == own[name].shape:
                    restored[key] = torch.empty_like(parameter, dtype=entry.dtype, requires_grad=False)
                    local(restored[key]).copy_(entry.rows(own[name].first, own[name].rows))
                else:  # torch keeps step counts on the CPU unless the update runs as one kernel
                    restored[key] = entry.read().to(parameter.device if parameter in on_device else "cpu")


# ── tensors and files ─────────────────────────────────────────────────────────────────────────────────────────────


def _write_tensors(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> list[Path]:
    """Writes this rank's tensors into files of its own, of those that all ranks write together; returns them."""
    sizes_of = everyones({name: tensor.nbytes for name, tensor in tensors.items()}, ranks.files)
    file_of: dict[str, int] = {}
    sizes: list[int] = []
    mine = ranks.rank if ranks.files is not None else 0
    for rank, of_rank in enumerate(sizes_of):
        first = len(sizes)
        for name, size in of_rank.items():
            if name in file_of:
                continue  # two stages have it
            if len(sizes) == first or (sizes[-1] and sizes[-1] + size > FILE_BYTES):
                sizes.append(0)
            file_of[name] = len(sizes)
            sizes[-1] += size
        if rank == mine:
            own = range(first, len(sizes))
    if not file_of:
        return []
    # safetensors assembles a file in memory and aborts the process when it cannot; Python raises MemoryError instead.
    bytearray(max((sizes[number] for number in own), default=0))
    tensors = {name: tensor for name, tensor in tensors.items() if file_of[name] - 1 in own}
    writer = HuggingFaceStorageWriter(str(folder), file_of)
    with _dcp_errors():
        dcp.save(tensors, storage_writer=writer, process_group=ranks.files, no_dist=ranks.files is None)
    return [folder / f"model-{number + 1:05d}-of-{len(sizes):05d}.safetensors" for number in own]


def _read_parts(folder: Path, tensors: dict[str, Tensor], own: dict[str, Part]) -> None:
    """Fills this rank's part of each tensor; values that rest in FP8 are multiplied by their scales."""
    stored = open_folder(folder)
    with torch.no_grad():
        for name, tensor in tensors.items():
            entry, part = stored[name], own[name]
            if name + SCALE in stored:
                values = dequantise(entry.read(), stored[name + SCALE].read())[part.first : part.first + part.rows]
            elif part.whole:
                values = entry.read()
            else:
                values = entry.rows(part.first, part.rows)
            local(tensor).copy_(values)


@contextmanager
def _dcp_errors() -> Iterator[None]:
    """Keep DCP from warning that there is no process group, and have its errors as they were raised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None


def _refuse(folder: Path, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise BadInput(f"{folder}: not this model's weights: {what} {', '.join(names[:3])}{more}")


def _found(folder: Path) -> list[Checkpoint]:
    """Every checkpoint of a folder, newest first; at the same step the one saved again comes before the `.old`."""
    found = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        if match := re.fullmatch(r"step-(\d+)(\.old)?", entry.name):
            found.append((int(match[1]), not match[2], entry))
    return [Checkpoint(path, step) for step, _, path in sorted(found, reverse=True)]


def _seal(folder: Path, step: int, digests: dict[str, dict[str, Any]]) -> None:
    """Write checksums.json over all files of a checkpoint, some of them known, and bring everything to the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = digests.get(name) or _summed(path)
    sums = {"format_version": FORMAT_VERSION, "step": step, "files": files}
    (folder / "checksums.json").write_bytes(_json(sums))
    for path in (folder / "checksums.json", *(entry for entry in folder.iterdir() if entry.is_dir()), folder):
        _flush(path)


def _summed(path: Path) -> dict[str, Any]:
    """What checksums.json says of a file, which is on the disk then."""
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint, None when it is whole."""
    try:
        sums = json.loads((checkpoint.path / "checksums.json").read_bytes())
        if sums["format_version"] != FORMAT_VERSION:
            return f"format version {sums['format_version']} is not {FORMAT_VERSION}"
        if sums["step"] != checkpoint.step:
            return f"belongs to step {sums['step']}"
        for name, expected in sums["files"].items():
            path = checkpoint.path / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except (FileNotFoundError, NotADirectoryError):
        return "checksums.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "checksums.json is damaged"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return "the disk fails to read it"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run_facts(run: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((run / "run.json").read_bytes())
        version = facts["format_version"]
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{run / 'run.json'}: damaged") from None
    if version != FORMAT_VERSION:
        raise BadInput(f"{run}: has run format {version}, this program reads {FORMAT_VERSION}")
    return facts


def _as_released(model: ModelConfig, stored: ModelConfig) -> ModelConfig:
    """`model` with those fields of `stored` that no weight depends on: a recipe does not know what a release says."""
    told = {key: getattr(stored, key) for key in ("verbatim", "num_key_value_heads", "initializer_range")}
    return model.model_copy(update=told)


def _write_facts(
    run: Path,
    data_fingerprint: str | None,
    data: str | None,
    chats: bool,
    scores: bool = False,
    base: dict[str, str] | None = None,
) -> None:
    facts = {"format_version": FORMAT_VERSION, "data_fingerprint": data_fingerprint, "data": data, "chats": chats}
    kind: dict[str, Any] = ({"scores": True} if scores else {}) | ({"base": base} if base else {})
    write_json(run / "run.json", facts | kind)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BadInput(f"{path}: there is a file in the way of this folder") from None


def _remove(path: Path) -> None:
    """Remove a checkpoint so that at no moment half of one stands under its name."""
    if path.exists():
        hidden = path.with_name(f".removing-{path.name}")
        path.rename(hidden)
        shutil.rmtree(hidden)


def _remove_leftovers(folder: Path) -> None:
    for pattern in (".writing-*", ".removing-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def write_json(path: Path, content: Any) -> None:
    """JSON for people and programs, replaced in one move."""
    _write_whole(path, _json(content))


def _write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one move: a reader finds the old content or the new one."""
    writing = path.with_name(f".writing-{path.name}")
    with writing.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    writing.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
