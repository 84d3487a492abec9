"""A task: a file of questions, each with what a model is asked and how its reply is judged (report §4.4).

The project's own format, TASK.jsonl, has rows {"prompt", "verify", "answer"} and what the verifier needs beside. The
files of well-known benchmarks are read as their publishers wrote them: `formats.py` says how.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanseek.config import BadInput
from leanseek.data.clean import decode_utf8
from leanseek.data.read import batches, find_source
from leanseek.eval.formats import FORMATS, Format, Item
from leanseek.eval.verify import check


@dataclass(frozen=True)
class Task:
    """Questions of one format. `left_out`: rows that cannot be asked, as "line 7: has no text 'answer'"."""

    name: str
    format: Format
    items: list[Item]
    left_out: list[str] = field(default_factory=list)


def read_task(file: Path | str) -> Task:
    """Raises BadInput for a file that cannot be read, or of whose rows none can be asked."""
    file = Path(file)
    source = find_source(str(file))
    items: list[Item] = []
    left_out: list[str] = []
    form: Format | None = None
    for where, row in _rows(file, left_out):
        form = form or next((one for one in FORMATS if one.fits(row)), None)
        if form is None:
            left_out.append(f"{where}: of no format that is known, it has {', '.join(map(repr, row)) or 'nothing'}")
            continue
        missing = [name for name in form.needs if name not in row]
        if missing:
            left_out.append(f"{where}: has no {missing[0]!r}")
            continue
        try:
            item = form.read(row)
            wrong = check(item.row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            wrong = f"is not as {form.name} has it ({error})"
        if wrong is None:
            items.append(item)
        else:
            left_out.append(f"{where}: {wrong}")
    if form is None or not items:
        first = left_out[0] if left_out else "it is empty"
        raise BadInput(f"{file}: no row of it can be asked; the first: {first}")
    return Task(source.name, form, items, left_out)


def _rows(file: Path, left_out: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for batch in batches([find_source(str(file))]):
        if batch.kind != "jsonl":
            raise BadInput(f"{file}: a task is a .jsonl file (+.gz, .zst), one question on each line")
        for number, line in enumerate(batch.rows, batch.first):
            if not line.strip():
                continue
            try:
                text, _ = decode_utf8(line)
                row = json.loads(text)
            except (ValueError, RecursionError, BadInput):
                left_out.append(f"line {number}: not JSON")
                continue
            if isinstance(row, dict):
                yield f"line {number}", row
            else:
                left_out.append(f"line {number}: not an object")


# ── what a model is asked ─────────────────────────────────────────────────────────────────────────────────────────


def examples_for(number: int, items: Sequence[Item], pool: Sequence[Item] | None, shots: int) -> list[Item]:
    """The solved examples before question `number` of `items`: the first of its group in `pool`, else in the items
    themselves without itself. So almost all questions of a group begin alike, and the engine reads that once."""
    item = items[number]
    among = [other for other in (items if pool is None else pool) if other is not item]
    own = [other for other in among if other.group == item.group]
    return (own if len(own) >= shots else among)[:shots]


def as_text(item: Item, examples: Sequence[Item]) -> str:
    """For a model that continues text: the examples with their answers, then the question up to its answer."""
    solved = [example.question + example.cue + example.solution for example in examples]
    return item.header + "\n\n".join([*solved, item.question + item.cue])


def as_chat(item: Item, examples: Sequence[Item]) -> list[dict[str, Any]]:
    """For a model that chats: each example a turn of its own."""
    turns = [
        {"role": role, "content": text}
        for example in examples
        for role, text in (("user", example.question), ("assistant", example.solution.strip()))
    ]
    return [*turns, {"role": "user", "content": item.question}]


def chosen(count: int, limit: int | None, seed: int) -> list[int]:
    """The numbers of the questions that are asked, in order: all, or `limit` of them by chance."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(f"questions:{seed}").sample(range(count), limit))
