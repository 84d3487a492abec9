"""Sums of two numbers, worked out column by column from the right: text, demonstrations and task rows.

    python scripts/column_sums.py FOLDER

text.jsonl: the pieces of the skill, apart from each other: small sums, numbers read backwards. chats.jsonl: a few
demonstrations of the whole. train.jsonl: many more questions, with nothing but their answers. dev.jsonl, test.jsonl:
questions that are in none of the others. Everything is a function of the seed in this file.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SEED = 20
DIGITS = 2
DOCUMENTS, DEMONSTRATIONS, TRAINING, HELD_OUT = 6000, 2000, 5000, 400


def demonstration(left: int, right: int) -> str:
    """The sum of each column with what was carried into it, then the answer: "<think>12 11 5</think>512"."""
    columns, carried, a, b = [], 0, left, right
    while a or b:
        columns.append(a % 10 + b % 10 + carried)
        carried, a, b = columns[-1] // 10, a // 10, b // 10
    return f"<think>{' '.join(map(str, columns))}</think>{left + right}"


def document(dice: random.Random) -> str:
    """Some lines of one kind: a small sum with or without a carry, or a number and its digits from the right."""
    lines = []
    for _ in range(12):
        a, b, carried, n = dice.randrange(10), dice.randrange(10), dice.randrange(2), dice.randrange(200)
        kind = dice.randrange(2)
        if kind == 0:
            lines.append(f"{a}+{b}{'+1' * carried}={a + b + carried}")
        else:
            lines.append(f"{n} {' '.join(reversed(str(n)))}")
    return "\n".join(lines)


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(SEED)
    numbers = range(10 ** (DIGITS - 1), 10**DIGITS)
    pairs = {
        (dice.choice(numbers), dice.choice(numbers)) for _ in range(TRAINING + DEMONSTRATIONS + 2 * HELD_OUT + 999)
    }
    asked = sorted(pairs)
    dice.shuffle(asked)
    tasks = [{"prompt": f"{a}+{b}", "verify": "exact", "answer": str(a + b)} for a, b in asked]
    write(folder / "text.jsonl", ({"text": document(dice)} for _ in range(DOCUMENTS)))
    shown = asked[2 * HELD_OUT :][:DEMONSTRATIONS]
    write(folder / "chats.jsonl", ({"prompt": f"{a}+{b}", "response": demonstration(a, b)} for a, b in shown))
    write(folder / "dev.jsonl", tasks[:HELD_OUT])
    write(folder / "test.jsonl", tasks[HELD_OUT : 2 * HELD_OUT])
    write(folder / "train.jsonl", tasks[2 * HELD_OUT + DEMONSTRATIONS :][:TRAINING])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
