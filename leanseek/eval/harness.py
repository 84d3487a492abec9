"""Evaluation of a run: tasks by name, each to a dictionary of its results."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanseek.checkpoint import chats, check_run, data_of, read_run
from leanseek.config import BadInput, Config, nearest
from leanseek.data.chats import fingerprint_of, longest_of, open_chats
from leanseek.data.read import read_texts
from leanseek.data.shards import open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.bpb import BPB, answers_bits_per_byte, answers_of, bits_per_byte
from leanseek.serve.llm import LLM

TASKS = ("bpb",)

Documents = Iterable[tuple[list[int] | NDArray[np.integer], int]]


def evaluate(run: Path | str, tasks: list[str], text: Path | str | None = None) -> dict[str, dict[str, Any]]:
    """Results by task: bpb → {"bpb", "bytes", "tokens"}, of a text file or else of the run's own validation split.

    Of a run that was taught to chat, those are the answers in the chats it was not trained on.
    Raises BadInput for an unknown task, a RUN that cannot be loaded, and text that cannot be read.
    """
    run = Path(run)
    for task in tasks:
        if task not in TASKS:
            raise BadInput(f"no task {task!r}{nearest(task, list(TASKS))}; there are: {', '.join(TASKS)}")
    config = read_run(run)
    llm = LLM.load(run)
    if text is None and chats(run):
        bpb = _answers(run, config, llm)
    else:
        documents = _validation(run, config, llm.tokenizer) if text is None else _documents(Path(text), llm.tokenizer)
        bpb = bits_per_byte(llm.model, documents, config.stages[-1].sequence_length, llm.tokenizer.bos_id)
    return {task: asdict(bpb) for task in tasks}


def _answers(run: Path, config: Config, llm: LLM) -> BPB:
    """The answers in the held-out chats of the file that the run was trained on."""
    file = data_of(run)
    if not file.is_file():
        raise BadInput(f"{run}: the chats it was trained on are no longer at {file}: give --text")
    check_run(run, config, fingerprint_of(file))
    _, held_out, _ = open_chats(file, llm.tokenizer, longest_of(config.stages))
    answers = answers_of(map(held_out.sample, range(len(held_out))), llm.tokenizer)
    return answers_bits_per_byte(llm.model, answers)


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
