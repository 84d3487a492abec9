"""Sums of two numbers, worked out column by column from the right: text, demonstrations and task rows.

    python -m scripts.column_sums FOLDER [DEMONSTRATIONS]

text.jsonl: the pieces of the skill apart from each other, small sums and numbers read backwards. chats.jsonl: a few
demonstrations of the whole. train.jsonl: many more questions, with nothing but their answers. dev.jsonl and test.jsonl:
questions that are in none of the others. Everything is a function of the seed in this file.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SEED = 20
NUMBERS = range(10, 100)
DOCUMENTS, DEMONSTRATIONS, HELD_OUT = 6000, 400, 400


def columns(a: int, b: int) -> str:
    """The sum of each column with what was carried into it: "12 8" for 35 + 47."""
    sums, carried = [], 0
    while a or b:
        sums.append(a % 10 + b % 10 + carried)
        carried, a, b = sums[-1] // 10, a // 10, b // 10
    return " ".join(map(str, sums))


def demonstration(a: int, b: int) -> dict[str, Any]:
    return {"prompt": f"{a}+{b}", "response": f"<think>{columns(a, b)}</think>{a + b}"}


def document(dice: random.Random) -> str:
    lines = []
    for _ in range(12):
        a, b, carried, n = dice.randrange(10), dice.randrange(10), dice.randrange(2), dice.randrange(200)
        small, backwards = f"{a}+{b}{'+1' * carried}={a + b + carried}", f"{n} {' '.join(reversed(str(n)))}"
        lines.append(dice.choice((small, backwards)))
    return "\n".join(lines)


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path, demonstrations: int = DEMONSTRATIONS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(SEED)
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS]
    dice.shuffle(pairs)
    tasks = [{"prompt": f"{a}+{b}", "verify": "exact", "answer": str(a + b)} for a, b in pairs]
    write(folder / "dev.jsonl", tasks[:HELD_OUT])
    write(folder / "test.jsonl", tasks[HELD_OUT : 2 * HELD_OUT])
    shown, left = pairs[2 * HELD_OUT :][:demonstrations], tasks[2 * HELD_OUT + demonstrations :]
    write(folder / "chats.jsonl", (demonstration(a, b) for a, b in shown))
    write(folder / "train.jsonl", left)
    write(folder / "text.jsonl", ({"text": document(dice)} for _ in range(DOCUMENTS)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
