"""CPU-seconds per token: short runs of all rows in turn, each in a process of its own."""

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from leanseek.bench import controls
from leanseek.bench.rows import Row, config_of, control_of
from leanseek.config import Piece
from leanseek.data.shards import open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.train.counts import counts_of
from leanseek.train.cpu import ready_cpu
from leanseek.train.log import read_metrics
from leanseek.train.pairs import beginning
from leanseek.train.pretrain import pretrain
from leanseek.train.schedule import Kind, kinds_of_tokens

SPEED_ROUNDS, SPEED_STEPS, SPEED_WARM_UP = 3, 12, 3


def measure_speed(
    rows: list[tuple[Row, Path, str]], rounds: int = SPEED_ROUNDS, steps: int = SPEED_STEPS
) -> list[list[float]]:
    """CPU-seconds per token by row and round; a row comes with its DATA and its dtype. In turn: A B C A B C.

    Each is measured on one thread: there a CPU-second is work, while threads that wait for each other on a busy machine
    burn CPU-seconds for nothing.
    """
    found: list[list[float]] = [[] for _ in rows]
    for _ in range(rounds):
        for (row, folder, dtype), times in zip(rows, found, strict=True):
            times.append(speed_of(row, folder, dtype, steps))
    return found


def speed_of(row: Row, folder: Path, dtype: str, steps: int = SPEED_STEPS) -> float:
    """CPU-seconds per token of a row, from short runs in processes of their own, their first steps left out.

    A recipe's kinds of tokens are measured one by one, and weighted; so are those of a control that are of a sampled
    softmax, and the others.
    """
    if row.control is None:
        kinds = kinds_of_tokens(config_of(row, row.tokens, None, 0))
    else:
        shares = {Kind(counted=True): row.control.sampled, Kind(): 1 - row.control.sampled}
        kinds = {kind: share for kind, share in shares.items() if share}

    def timed(kind: Kind) -> float:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_short_run, row, folder, dtype, steps, kind).result()

    return sum(share * timed(kind) for kind, share in kinds.items())


def counting_cpu_seconds(row: Row, folder: Path) -> float:
    """CPU-seconds of counting the text, where a recipe learns from counts."""
    config = None if row.control else config_of(row, row.tokens, None, 0)
    if config is None or config.counts is None:
        return 0.0
    data, began = open_data(folder, verify=False), time.process_time()
    beginning(config, counts_of(config, data, Tokenizer.load(data.tokenizer_folder), torch.device("cpu")))
    return time.process_time() - began


def _short_run(row: Row, folder: Path, dtype: str, steps: int, kind: Kind) -> float:
    ready_cpu()
    torch.set_num_threads(1)
    warm_up = min(SPEED_WARM_UP, steps - 1)
    run = folder.parent / "runs" / f".speed-{os.getpid()}"
    shutil.rmtree(run, ignore_errors=True)
    try:
        with silence():
            if row.control:
                control = replace(control_of(row, row.tokens, None), sampled=float(kind.counted))
                data = open_data(folder, verify=False)
                ended = controls.train(control, dtype, 0, data, run, 1, most_steps=steps)
                return median(ended["step_cpu_seconds"][warm_up:]) / control.batch_tokens
            config = config_of(row, row.tokens, None, 0)
            assert kind.batch is not None
            held = {"batch_tokens": kind.batch, "mtp_weight": 0.1 * kind.mtp, "count_weight": 0.5 * kind.counted}
            pieces: dict[str, tuple[Piece, ...]] = {name: (Piece(until=1, value=it),) for name, it in held.items()}
            pieces["layers"] = () if kind.layers is None else (Piece(until=1, value=kind.layers),)
            # Nothing but steps between the first and the last.
            train = {"max_steps": steps, "eval_every": 10**9, "eval_tokens": 1, "checkpoint_every": 10**9}
            config = config.model_copy(
                update={
                    "schedule": config.schedule.model_copy(update=pieces),
                    "train": config.train.model_copy(update=train),
                    "stages": (config.stages[kind.stage].model_copy(update={"share": 1.0}),),
                }
            )
            pretrain(config, folder, run)
            lines = read_metrics(run)[0]
            pairs = zip(lines[warm_up - 1 :], lines[warm_up:], strict=False)
            return median((b["cpu_seconds"] - a["cpu_seconds"]) / (b["tokens"] - a["tokens"]) for a, b in pairs)
    finally:
        shutil.rmtree(run, ignore_errors=True)


@contextmanager
def silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        yield
