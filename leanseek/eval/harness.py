"""Evaluation of a run: bits per byte and task files, each to a dictionary of its results, kept with the run."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanseek.checkpoint import chats, check_run, data_of, read_run, write_json
from leanseek.config import BadInput, Config, nearest
from leanseek.data.chats import fingerprint_of, longest_of, open_chats
from leanseek.data.read import read_texts
from leanseek.data.shards import open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.ask import Settings, ask, tell, warnings
from leanseek.eval.bpb import BPB, Window, answers_bits_per_byte, answers_of, bits_per_byte, windows_of
from leanseek.eval.records import fingerprint
from leanseek.eval.standing import Standing, standing
from leanseek.eval.tasks import Task, read_task
from leanseek.serve.llm import LLM

TASKS = ("bpb",)
AS_IT_IS = Settings()
LOOKED_AT = 256  # documents from whose beginning the standing columns are taken

Documents = Iterable[tuple[list[int] | NDArray[np.integer], int]]


def evaluate(
    run: Path | str,
    tasks: Sequence[str],
    text: Path | str | None = None,
    files: Sequence[Path | str] = (),
    examples: Path | str | None = None,
    settings: Settings = AS_IT_IS,
    out: Path | None = None,
    averaged: bool = False,
) -> dict[str, dict[str, Any]]:
    """Results by task: bpb → {"bpb", "bytes", "tokens"}, of a text file or else of the run's own validation split.

    Of a run that was taught to chat, those are the answers in the chats it was not trained on. A task file, by its
    name → {"score", "stderr", "n", …}; the solved examples before its questions are its own, or those of `examples`.
    All results are kept in RUN/eval, or `out`, where `report` finds them, those of `averaged` weights in RUN/eval-ema;
    what was answered before is not asked again. Raises BadInput for an unknown task, a RUN that cannot be loaded, and
    files that cannot be read.
    """
    run = Path(run)
    for task in tasks:
        if task not in TASKS:
            raise BadInput(
                f"no task {task!r}{nearest(task, list(TASKS))}; there are: {', '.join(TASKS)}, and --task FILE"
            )
    config = read_run(run)
    asked = [read_task(file) for file in files]
    _told_apart(asked)
    pool = None if examples is None else read_task(examples)
    for task_file in asked:
        if pool is not None and pool.format.name != task_file.format.name:
            formats = f"{pool.format.name}, {task_file.name} of {task_file.format.name}"
            raise BadInput(f"{examples}: these examples are of the format {formats}: they need the same one")
    llm = LLM.load(run, averaged=averaged)
    folder = out or run / ("eval-ema" if averaged else "eval")
    results: dict[str, dict[str, Any]] = {}
    for task in tasks:
        bpb, beside = _bits_per_byte(run, config, llm, text)
        results[task] = asdict(bpb)
        name = task if text is None else f"{task}-{Path(text).name.partition('.')[0]}"
        _keep(folder, name, results[task] | asdict(beside))
    weights = weights_of(run)
    for task_file in asked:
        result = ask(llm, task_file, settings, folder, weights, chats(run), None if pool is None else pool.items)
        for line in warnings(task_file, result, config.model.max_position_embeddings):
            tell(line)
        results[task_file.name] = result
        _keep(folder, task_file.name, result)
    return results


def weights_of(run: Path) -> str:
    """A fingerprint of a run's weights: of the checksums that its checkpoints were sealed with."""
    return fingerprint(sorted(file.read_text() for file in (run / "checkpoints").glob("*/checksums.json")))


def results_of(run: Path) -> dict[str, dict[str, Any]]:
    """What evaluations left in RUN/eval, by name."""
    found = {}
    for file in sorted((run / "eval").glob("*.json")):
        try:
            found[file.stem] = json.loads(file.read_bytes())
        except ValueError:
            raise BadInput(f"{file}: is damaged: remove it and evaluate again") from None
    return found


def _keep(folder: Path, name: str, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", result)


def _told_apart(asked: Sequence[Task]) -> None:
    names = [*TASKS, *(task.name for task in asked)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"two tasks are named {twice!r}: rename a file, for its name is the task's")


def _bits_per_byte(run: Path, config: Config, llm: LLM, text: Path | str | None) -> tuple[BPB, Standing]:
    if text is None and chats(run):
        return _answers(run, config, llm)
    documents = _validation(run, config, llm.tokenizer) if text is None else _documents(Path(text), llm.tokenizer)
    length, bos = config.stages[-1].sequence_length, llm.tokenizer.bos_id
    rest = iter(documents)
    some = list(islice(rest, LOOKED_AT))
    bpb = bits_per_byte(llm.model, chain(some, rest), length, bos)
    windows: Iterator[Window] = (one for ids, _ in some for one in windows_of(np.asarray(ids, np.int64), length, bos))
    return bpb, standing(llm.model, windows)


def _answers(run: Path, config: Config, llm: LLM) -> tuple[BPB, Standing]:
    """The answers in the held-out chats of the file that the run was trained on."""
    file = data_of(run)
    if not file.is_file():
        raise BadInput(f"{run}: the chats it was trained on are no longer at {file}: give --text")
    check_run(run, config, fingerprint_of(file))
    _, held_out, _ = open_chats(file, llm.tokenizer, longest_of(config.stages))
    answers = answers_of(map(held_out.sample, range(len(held_out))), llm.tokenizer)
    return answers_bits_per_byte(llm.model, answers), standing(llm.model, answers.windows)


def _validation(run: Path, config: Config, tokenizer: Tokenizer) -> Documents:
    """The validation split of the data that the run was trained on."""
    folder = data_of(run)
    if not folder.is_dir():
        raise BadInput(f"{run}: the data it was trained on is no longer at {folder}: give --text")
    data = open_data(folder)
    check_run(run, config, data.fingerprint)
    if data.tokenizer_fingerprint != tokenizer.fingerprint:
        raise BadInput(f"{run}: its tokenizer is not the one that wrote {folder}: give --text")
    return data.documents("validation")


def _documents(file: Path, tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """The documents of a text file: ids, and bytes as given."""
    for text, raw_bytes in read_texts(file, lambda line: print(f"warning: {line}", file=sys.stderr)):
        yield tokenizer.encode(text), raw_bytes
