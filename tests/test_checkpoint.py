"""The run folder: round trips to the bit, damage, kills inside a save, a full disk, one process at a time."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from leanseek import checkpoint
from leanseek.config import BadInput, Config, read_recipe

# ── a small model with all that a checkpoint must carry ───────────────────────────────────────────────────────────


class Toy(nn.Module):
    """Weights in BF16, a persistent FP32 bias beside them, and a buffer that is not to be saved."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.bias: torch.Tensor
        self.embed = nn.Embedding(10, width, dtype=torch.bfloat16)
        self.experts = nn.Parameter(torch.randn(3, width, 4, dtype=torch.bfloat16))
        self.head = nn.Linear(width, 10, bias=False)
        self.register_buffer("bias", torch.randn(3))
        self.register_buffer("counts", torch.zeros(3), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(ids) + self.experts.mean((0, 2))
        return hidden.float() @ self.head.weight.T


class Momentum(Optimizer):
    """An optimizer of ours: its only state is `momentum_buffer`, in FP32 whatever the parameter's dtype."""

    def __init__(self, params: list[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "coefficients": (3.0, -4.0)})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                assert p.grad is not None
                state = self.state[p]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(p, dtype=torch.float32))
                buffer.mul_(group["momentum"]).add_(p.grad.float())
                p.data.add_(buffer.to(p.dtype), alpha=-group["lr"])


def build(seed: int) -> tuple[Toy, list[Optimizer]]:
    torch.manual_seed(seed)
    model = Toy()
    with torch.no_grad():
        model.bias.copy_(torch.randn(3) / 3)
    groups: list[dict[str, Any]] = [
        {"params": [model.embed.weight]},
        {"params": [model.head.weight], "weight_decay": 0.0},
    ]
    return model, [AdamW(groups, lr=1e-2, betas=(0.9, 0.95)), Momentum([model.experts], 1e-2)]


def train(model: Toy, optimizers: list[Optimizer], steps: int) -> None:
    ids = torch.arange(10)
    for _ in range(steps):
        nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.step()
            optimizer.zero_grad()
        model.bias += 0.001


def snapshot(model: Toy, optimizers: list[Optimizer]) -> dict[str, object]:
    """Every number of model and optimizers, tensors as (dtype, bytes)."""

    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape), value.detach().reshape(-1).view(torch.uint8).tolist()
        return value

    taken: dict[str, object] = {name: plain(tensor) for name, tensor in model.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for g, group in enumerate(optimizer.param_groups):
            taken |= {f"{i}.{g}.{key}": value for key, value in group.items() if key != "params"}
            for n, parameter in enumerate(group["params"]):
                taken |= {f"{i}.{g}.{n}.{key}": plain(v) for key, v in optimizer.state.get(parameter, {}).items()}
    return taken


def quiet(line: str) -> None:
    raise AssertionError(f"unexpected warning: {line}")


def one_line(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def saved_run(run: Path, steps: tuple[int, ...] = (10, 20)) -> tuple[Toy, list[Optimizer]]:
    model, optimizers = build(0)
    for step in steps:
        train(model, optimizers, 1)
        checkpoint.save(run, step, model, optimizers, {"step": step}, keep=len(steps))
    return model, optimizers


# ── saving and loading ────────────────────────────────────────────────────────────────────────────────────────────


def test_round_trip_is_exact_to_the_bit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, optimizers = build(0)
    train(model, optimizers, 3)
    state = {
        "loader": {"stage": 0, "sample": 7},
        "tokens": 12288,
        "skipped": [[3, 9]],
        "seconds": 0.1 + 0.2,
        "none": None,
    }
    before = snapshot(model, optimizers)
    path = checkpoint.save(tmp_path, 120, model, optimizers, state, keep=2)
    assert path == tmp_path / "checkpoints" / "step-00000120"

    other, others = build(1)
    train(other, others, 1)
    assert snapshot(other, others) != before
    found = checkpoint.newest(tmp_path, quiet)
    assert found is not None
    assert (found.path, found.step) == (path, 120)
    assert checkpoint.load(found, other, others) == state
    assert snapshot(other, others) == before
    assert (other.bias.dtype, other.experts.dtype) == (torch.float32, torch.bfloat16)
    assert others[1].state[other.experts]["momentum_buffer"].dtype == torch.float32
    train(model, optimizers, 2)
    train(other, others, 2)
    assert snapshot(other, others) == snapshot(model, optimizers)
    assert capfd.readouterr() == ("", "")


def test_optimizers_that_never_stepped_have_no_state_afterwards(tmp_path: Path) -> None:
    model, optimizers = build(0)
    checkpoint.save(tmp_path, 0, model, optimizers, {}, keep=1)
    other, others = build(1)
    train(other, others, 1)
    found = checkpoint.newest(tmp_path, quiet)
    assert found is not None
    checkpoint.load(found, other, others)
    assert snapshot(other, others) == snapshot(model, optimizers)
    assert not others[0].state
    assert not others[1].state


def test_weights_lie_in_files_other_tools_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(checkpoint, "FILE_BYTES", 200)
    model, optimizers = build(0)
    path = checkpoint.save(tmp_path, 1, model, optimizers, {}, keep=1)
    files = sorted((path / "model").glob("*.safetensors"))
    assert len(files) == 3  # 160, 192, 320 and 12 bytes
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == model.state_dict().keys() == {"embed.weight", "experts", "head.weight", "bias"}
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())
    other, _ = build(1)
    checkpoint.load_model_weights(path / "model", other)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    model, optimizers = build(0)
    for step in (5, 9, 10, 100, 200):
        checkpoint.save(tmp_path, step, model, optimizers, {}, keep=3)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000010", "step-00000100", "step-00000200"]
    checkpoint.save(
        tmp_path, 100, model, optimizers, {"again": True}, keep=3
    )  # turned back: 200 is no longer this run's
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000010", "step-00000100"]
    found = checkpoint.newest(tmp_path, quiet)
    assert found is not None
    assert found.state() == {"again": True}


# ── loading what does not fit, or means harm ──────────────────────────────────────────────────────────────────────


class Extra(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    saved_run(tmp_path)
    folder = tmp_path / "checkpoints" / "step-00000020" / "model"
    wider = Toy(width=16)
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    with pytest.raises(BadInput) as error:
        checkpoint.load_model_weights(folder, wider)
    one_line(error, "wrong shape of", "embed.weight ([10, 8], here [10, 16])", str(folder))
    assert all(torch.equal(before[name], tensor) for name, tensor in wider.state_dict().items())
    with pytest.raises(BadInput) as error:
        checkpoint.load_model_weights(folder, Extra())
    one_line(error, "missing gate.weight")
    with pytest.raises(BadInput) as error:
        checkpoint.load_model_weights(folder, nn.Module())
    one_line(error, "unexpected", "and 1 more")


def test_resuming_needs_the_same_dtypes_where_loading_weights_converts(tmp_path: Path) -> None:
    model, _ = saved_run(tmp_path)
    found = checkpoint.newest(tmp_path, quiet)
    assert found is not None
    other, others = build(1)
    other.experts.data = other.experts.data.float()
    with pytest.raises(BadInput) as error:
        checkpoint.load(found, other, others)
    one_line(error, "wrong dtype of experts (torch.bfloat16, here torch.float32)")
    checkpoint.load_model_weights(found.model, other)
    assert torch.equal(other.experts, model.experts.float())


def test_optimizers_over_other_groups_are_refused(tmp_path: Path) -> None:
    saved_run(tmp_path)
    found = checkpoint.newest(tmp_path, quiet)
    assert found is not None
    model, optimizers = build(1)
    with pytest.raises(BadInput) as error:
        checkpoint.load(found, model, optimizers[:1])
    one_line(error, "other optimizers")


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def test_no_file_is_ever_unpickled(tmp_path: Path) -> None:
    model, optimizers = saved_run(tmp_path)
    exploded = tmp_path / "exploded"
    path = tmp_path / "checkpoints" / "step-00000020"
    for folder in (path / "model", path / "optimizer", path):
        for name in (".metadata", "pytorch_model.bin", "model.pt", "__0_0.distcp"):
            (folder / name).write_bytes(pickle.dumps(Bomb(exploded)))
    found = checkpoint.newest(tmp_path, quiet)
    assert found is not None
    other, others = build(1)
    checkpoint.load(found, other, others)
    assert snapshot(other, others) == snapshot(model, optimizers)
    assert not exploded.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert exploded.exists()  # the bomb was live


def test_a_pickle_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    saved_run(tmp_path)
    exploded = tmp_path / "exploded"
    folder = tmp_path / "checkpoints" / "step-00000020" / "model"
    next(folder.glob("*.safetensors")).write_bytes(pickle.dumps(Bomb(exploded)))
    with pytest.raises(BadInput) as error:
        checkpoint.load_model_weights(folder, build(1)[0])
    one_line(error, str(folder), "not readable as safetensors")
    assert not exploded.exists()
    with pytest.raises(BadInput) as error:
        checkpoint.load_model_weights(tmp_path / "nothing", build(1)[0])
    one_line(error, "no such folder of weights")


# ── damage ────────────────────────────────────────────────────────────────────────────────────────────────────────


def damage(path: Path, how: str) -> None:
    if how == "truncate":
        os.truncate(path, path.stat().st_size - 1)
    elif how == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncate", "flip", "delete"])
def test_damage_anywhere_leads_to_the_checkpoint_before(tmp_path: Path, how: str) -> None:
    saved_run(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000020"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) == 7
    whole = tmp_path / "whole"
    shutil.copytree(newest, whole)
    for name in files:
        if how == "truncate" and name.name == "checksums.json":
            os.truncate(newest / name, 30)  # its last byte is only a line end
        else:
            damage(newest / name, how)
        lines: list[str] = []
        found = checkpoint.newest(tmp_path, lines.append)
        assert found is not None
        assert found.step == 10, name
        assert len(lines) == 1
        assert "\n" not in lines[0]
        assert str(newest) in lines[0]
        assert name.name in lines[0] or name.name == "checksums.json"
        shutil.rmtree(newest)
        shutil.copytree(whole, newest)
    assert checkpoint.newest(tmp_path, quiet) == checkpoint.Checkpoint(newest, 20)


def test_when_nothing_is_whole_the_run_is_refused_and_when_there_is_nothing_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, quiet) is None
    saved_run(tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        damage(path / "state.json", "delete")
    lines: list[str] = []
    with pytest.raises(BadInput) as error:
        checkpoint.newest(tmp_path, lines.append)
    one_line(error, str(tmp_path), "none of its 2 checkpoints is whole")
    assert len(lines) == 2


def test_a_checkpoint_of_a_later_format_or_under_another_step_is_passed_over(tmp_path: Path) -> None:
    saved_run(tmp_path)
    folder = tmp_path / "checkpoints"
    sums = json.loads((folder / "step-00000020" / "checksums.json").read_text())
    sums["format_version"] = 99
    (folder / "step-00000020" / "checksums.json").write_text(json.dumps(sums))
    shutil.copytree(folder / "step-00000010", folder / "step-00000030")
    lines: list[str] = []
    found = checkpoint.newest(tmp_path, lines.append)
    assert found is not None
    assert found.step == 10
    assert "belongs to step 10" in lines[0]
    assert "format version 99" in lines[1]


def test_leftovers_of_an_interrupted_save_are_ignored_then_removed(tmp_path: Path) -> None:
    model, optimizers = saved_run(tmp_path)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000020", folder / ".writing-step-00000030")
    shutil.copytree(folder / "step-00000020", folder / ".removing-step-00000005")
    found = checkpoint.newest(tmp_path, quiet)
    assert found is not None
    assert found.step == 20
    checkpoint.save(tmp_path, 30, model, optimizers, {}, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000030"]


# ── dying inside a save ───────────────────────────────────────────────────────────────────────────────────────────

PRELUDE = f"""
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
import test_checkpoint as t
from leanseek import checkpoint
run = Path(sys.argv[1])
t.train(*t.build(0), 1)  # what torch imports late is imported here, once, and not in every child

def in_child(work):
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]
"""

KILLED = """
def killed_at(point, step):
    # SIGKILL in place of the given call among all those by which a save touches the disk
    calls = 0
    def before(call):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapper
    for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, before(getattr(os, name)))
    model, optimizers = t.build(0)
    t.train(model, optimizers, 2)
    checkpoint.save(run, step, model, optimizers, {"seed": 0}, keep=1)

for step in (10, 11):
    point, status = 0, -1
    while status:
        point += 1
        status = in_child(lambda: killed_at(point, step))
        assert status in (0, signal.SIGKILL), status
        found = checkpoint.newest(run, t.quiet)
        model, optimizers = t.build(1)
        state = checkpoint.load(found, model, optimizers)
        print(step, found.step, state["step"] if "step" in state else "new")
        if found.path.name != "step-00000010" or "step" not in state:
            checkpoint.shutil.rmtree(run / "checkpoints")
            checkpoint.shutil.copytree(sys.argv[2], run / "checkpoints")
"""


def run_script(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_kill_9_at_every_point_of_a_save_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved_run(run, (10,))
    shutil.copytree(run / "checkpoints", tmp_path / "before")
    done = run_script(KILLED, run, tmp_path / "before")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    outcomes = [tuple(line.split()) for line in done.stdout.splitlines()]
    over = [found for step, *found in outcomes if step == "10"]  # saved again at the same step
    after = [found for step, *found in outcomes if step == "11"]
    assert len(over) > 20
    assert len(after) > 20
    # first always the old one, from some call on always the new one
    assert over == sorted(over)
    assert after == sorted(after)
    assert (over[0], over[-1]) == (["10", "10"], ["10", "new"])
    assert (after[0], after[-1]) == (["10", "10"], ["11", "new"])


def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    at_rename: list[set[int]] = []
    fsync, rename = os.fsync, os.rename

    def watch_fsync(handle: int) -> None:
        flushed.append(os.fstat(handle).st_ino)
        fsync(handle)

    def watch_rename(source: Path, target: Path) -> None:
        at_rename.append(set(flushed))
        rename(source, target)

    model, optimizers = build(0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", watch_fsync)
        patched.setattr(os, "rename", watch_rename)
        path = checkpoint.save(tmp_path, 1, model, optimizers, {}, keep=1)
    assert len(at_rename) == 1
    assert {entry.stat().st_ino for entry in (path, *path.rglob("*"))} <= at_rename[0]
    assert flushed[-1] == path.parent.stat().st_ino


FULL = """
def limited(nbytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
    model, optimizers = t.build(1)
    t.train(model, optimizers, 1)
    try:
        checkpoint.save(run, 30, model, optimizers, {}, keep=1)
    except OSError as error:
        os._exit(7)

for nbytes in (100, 900, 1300):
    print(os.waitstatus_to_exitcode(in_child(lambda: limited(nbytes))), sorted(os.listdir(run / "checkpoints")))
"""


def test_a_full_disk_is_an_oserror_and_leaves_the_last_checkpoints(tmp_path: Path) -> None:
    model, optimizers = saved_run(tmp_path)
    done = run_script(FULL, tmp_path)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["7 ['step-00000010', 'step-00000020']"] * 3
    found = checkpoint.newest(tmp_path, quiet)
    assert found is not None
    other, others = build(1)
    checkpoint.load(found, other, others)
    assert snapshot(other, others) == snapshot(model, optimizers)


def test_no_space_at_the_last_moment_leaves_the_checkpoint_it_would_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizers = saved_run(tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 20, model, optimizers, {}, keep=1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000020"]
    found = checkpoint.newest(tmp_path, quiet)
    assert found is not None
    assert found.state() == {"step": 20}


# ── one process at a time ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_is_locked_for_other_processes_until_its_holder_dies(tmp_path: Path) -> None:
    run = tmp_path / "run"
    hold = "with checkpoint.lock(run):\n    print('held', flush=True)\n    signal.pause()"
    holder = subprocess.Popen([sys.executable, "-c", PRELUDE + hold, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(BadInput) as error, checkpoint.lock(run):
                pass
            one_line(error, f"{run} is in use by another process")
        finally:
            holder.send_signal(signal.SIGKILL)
    with checkpoint.lock(run):
        pass
    with checkpoint.lock(run):
        pass


def test_a_file_in_the_place_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a diary")
    with pytest.raises(BadInput) as error, checkpoint.lock(tmp_path / "run"):
        pass
    one_line(error, str(tmp_path / "run"), "a file in the way")


# ── the run and its configuration ─────────────────────────────────────────────────────────────────────────────────


def made_run(tmp_path: Path, config: Config) -> Path:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    run = tmp_path / "run"
    with checkpoint.lock(run):
        assert checkpoint.check_run(run, config, "data-1") is None
        checkpoint.create_run(run, config, "data-1", tokenizer, tmp_path / "data")
    return run


def test_the_same_run_goes_on_with_what_may_change(tmp_path: Path) -> None:
    stored = read_recipe("nano", ["train.dtype=bf16", "train.device=cpu", "train.max_steps=5"])
    run = made_run(tmp_path, stored)
    assert sorted(p.name for p in run.iterdir()) == [".lock", "checkpoints", "config.toml", "run.json", "tokenizer"]
    assert (run / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert checkpoint.read_run(run) == stored
    assert checkpoint.data_of(run) == tmp_path / "data"
    asked = read_recipe("nano", ["train.checkpoint_every=7", "train.keep_checkpoints=9", "train.eval_every=3"])
    going_on = checkpoint.check_run(run, asked, "data-1")
    assert going_on is not None
    assert going_on.train == asked.train.model_copy(update={"dtype": "bf16", "device": "cpu"})
    assert going_on.train.max_steps is None
    assert going_on.model == stored.model


def test_another_config_or_other_data_is_refused(tmp_path: Path) -> None:
    run = made_run(tmp_path, read_recipe("nano", ["train.dtype=bf16"]))
    with pytest.raises(BadInput) as error:
        checkpoint.check_run(run, read_recipe("nano", ["train.seed=3", "model.n_group=2"]), "data-1")
    one_line(error, str(run), "model.n_group: 4, 2; train.seed: 0, 3")
    with pytest.raises(BadInput) as error:
        checkpoint.check_run(run, read_recipe("nano", ["train.dtype=fp32"]), "data-1")
    one_line(error, "train.dtype: 'bf16', 'fp32'")
    with pytest.raises(BadInput) as error:
        checkpoint.check_run(run, read_recipe("small"), "data-1")
    one_line(error, " more: ")
    with pytest.raises(BadInput) as error:
        checkpoint.check_run(run, read_recipe("nano"), "data-2")
    one_line(error, str(run), "other data")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("mine = true")
    with pytest.raises(BadInput) as error:
        checkpoint.check_run(tmp_path, read_recipe("nano"), "data-1")
    one_line(error, str(tmp_path), "not a run")
    with pytest.raises(BadInput) as error:
        checkpoint.read_run(tmp_path)
    one_line(error, str(tmp_path), "not a run")


def test_an_interrupted_creation_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_recipe("nano")

    def die(source: Path, target: Path, dirs_exist_ok: bool) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", die)
        with pytest.raises(KeyboardInterrupt):
            made_run(tmp_path, config)
    run = tmp_path / "run"
    assert checkpoint.check_run(run, config, "data-1") is None
    checkpoint.create_run(run, config, "data-1", tmp_path / "tokenizer", tmp_path / "data")
    assert checkpoint.check_run(run, config, "data-1") == config


@pytest.mark.parametrize(("content", "what"), [("{", "damaged"), ('{"format_version": 99}', "run format 99")])
def test_a_damaged_or_later_run_is_named(tmp_path: Path, content: str, what: str) -> None:
    run = made_run(tmp_path, read_recipe("nano"))
    (run / "run.json").write_text(content)
    for read in (lambda: checkpoint.read_run(run), lambda: checkpoint.check_run(run, read_recipe("nano"), "data-1")):
        with pytest.raises(BadInput) as error:
            read()
        one_line(error, str(run), what)


# ── metrics ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_metrics_are_cut_back_and_lost_work_is_remembered(tmp_path: Path) -> None:
    assert checkpoint.cut_metrics(tmp_path, 3, 3) == {"seconds": 0.0, "cpu_seconds": 0.0, "flops": 0.0}
    assert not list(tmp_path.iterdir())
    lines = [
        json.dumps({"step": s, "loss": 1 / s, "seconds": 10.0 * s, "cpu_seconds": 20.0 * s, "flops": 1e9 * s}) + "\n"
        for s in range(1, 6)
    ]
    lines.insert(3, json.dumps({"step": 3, "bpb": 2.5}) + "\n")
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines) + '{"step": 6, "seconds": 6')
    assert checkpoint.cut_metrics(tmp_path, 3, 3) == {"seconds": 50.0, "cpu_seconds": 100.0, "flops": 5e9}
    assert path.read_text() == "".join(lines[:4])
    assert checkpoint.cut_metrics(tmp_path, 3, 3)["flops"] == 5e9  # killed again before it logged anything
    path.write_text("".join(lines[:4]).rstrip("\n"))  # whole but for the line end
    checkpoint.cut_metrics(tmp_path, 3, 3)
    assert path.read_text() == "".join(lines[:4])
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "spent.json"}
