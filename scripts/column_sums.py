"""Sums of two numbers, worked out column by column from the right, or not: text, demonstrations and task rows.

    python -m scripts.column_sums FOLDER

text.jsonl: small sums, numbers read backwards, and sums worked out, as a base model may have read them. chats.jsonl: a
few demonstrations, of which some show their work and most, as people do, say the result alone. train.jsonl: many more
questions, with nothing but their answers. dev.jsonl and test.jsonl: questions that are in none of the others, the text
included. Everything is a function of the seed in this file.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SEED = 20
NUMBERS = range(10, 100)
DOCUMENTS, DEMONSTRATIONS, HELD_OUT = 4500, 3000, 400
SHOWN = 0.4  # share of the demonstrations that show their work


def columns(a: int, b: int) -> str:
    """The sum of each column with what was carried into it: "12 8" for 35 + 47."""
    sums, carried = [], 0
    while a or b:
        sums.append(a % 10 + b % 10 + carried)
        carried, a, b = sums[-1] // 10, a // 10, b // 10
    return " ".join(map(str, sums))


def document(dice: random.Random, known: list[tuple[int, int]]) -> str:
    lines = []
    for _ in range(12):
        x, y, carried, (a, b) = dice.randrange(10), dice.randrange(10), dice.randrange(2), dice.choice(known)
        small, backwards = f"{x}+{y}{'+1' * carried}={x + y + carried}", f"{a} {' '.join(reversed(str(a)))}"
        lines.append(dice.choice((small, backwards, f"{a}+{b}: {columns(a, b)}: {a + b}")))
    return "\n".join(lines)


def demonstration(dice: random.Random, a: int, b: int) -> dict[str, Any]:
    work = f"<think>{columns(a, b)}</think>" if dice.random() < SHOWN else ""
    return {"prompt": f"{a}+{b}", "response": f"{work}{a + b}"}


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(SEED)
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS]
    dice.shuffle(pairs)
    tasks = [{"prompt": f"{a}+{b}", "verify": "exact", "answer": str(a + b)} for a, b in pairs]
    write(folder / "dev.jsonl", tasks[:HELD_OUT])
    write(folder / "test.jsonl", tasks[HELD_OUT : 2 * HELD_OUT])
    known, tasks = pairs[2 * HELD_OUT :], tasks[2 * HELD_OUT :]
    write(folder / "chats.jsonl", (demonstration(dice, a, b) for a, b in known[:DEMONSTRATIONS]))
    write(folder / "train.jsonl", tasks[DEMONSTRATIONS:])
    dice = random.Random(SEED + 1)
    write(folder / "text.jsonl", ({"text": document(dice, known)} for _ in range(DOCUMENTS)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
