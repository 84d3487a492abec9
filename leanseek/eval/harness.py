"""Evaluation of a run: tasks by name, each to a dictionary of its results."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanseek.checkpoint import check_run, data_of, read_run
from leanseek.config import BadInput, Config, nearest
from leanseek.data.read import read_texts
from leanseek.data.shards import open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.bpb import bits_per_byte
from leanseek.serve.engine import LLM

TASKS = ("bpb",)

Documents = Iterable[tuple[list[int] | NDArray[np.integer], int]]


def evaluate(run: Path | str, tasks: list[str], text: Path | str | None = None) -> dict[str, dict[str, Any]]:
    """Results by task: bpb → {"bpb", "bytes", "tokens"}, of a text file or else of the run's own validation split.

    Raises BadInput for an unknown task, a RUN that cannot be loaded, and text that cannot be read.
    """
    run = Path(run)
    for task in tasks:
        if task not in TASKS:
            raise BadInput(f"no task {task!r}{nearest(task, list(TASKS))}; there are: {', '.join(TASKS)}")
    config = read_run(run)
    llm = LLM.load(run)
    documents = _validation(run, config, llm.tokenizer) if text is None else _documents(Path(text), llm.tokenizer)
    context = config.stages[-1].sequence_length
    bpb = bits_per_byte(llm.model, documents, context, llm.tokenizer.bos_id)
    return {task: asdict(bpb) for task in tasks}


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
