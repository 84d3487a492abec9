"""Task files about the storyworld, to evaluate a run of `leanseek demo` with; none of these stories was trained on.

    python scripts/story_tasks.py FOLDER

stories.jsonl: a story and a question about it, to be answered in writing. who.jsonl: the same for people's names, the
answer to be found among four names. sums.jsonl and countdown.jsonl: puzzles, as some of the demo's chats have them.
"""

import json
import random
import re
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from leanseek.data.puzzles import arithmetic, countdown
from leanseek.data.storyworld import QUESTIONS, questions

Row = dict[str, Any]


def who(rows: Iterable[Row]) -> Iterable[Row]:
    """Questions whose answer is a name, with three other names as choices; where the story has them, from it."""
    dice = random.Random(0)
    known = [row["answer"] for row in questions(QUESTIONS, 1, 1000) if re.fullmatch(r"[A-Z][a-z]+", row["answer"])]
    for row in rows:
        story, _, asked = row["prompt"].rpartition("\n")
        if not asked.startswith("Who") or row["answer"] not in known:
            continue
        here = sorted({name for name in known if name in story and name != row["answer"]})
        others = sorted(set(known) - {*here, row["answer"]})
        choices = [row["answer"], *[*dice.sample(here, len(here)), *dice.sample(others, 3)][:3]]
        dice.shuffle(choices)
        cue = f"{row['prompt']} The story says:"
        yield {"prompt": cue, "verify": "choice", "choices": choices, "answer": row["answer"]}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        ("stories", islice(questions(QUESTIONS, 0, 1000), 400)),
        ("who", islice(who(questions(QUESTIONS, 0, 1000)), 100)),
        ("sums", (arithmetic(QUESTIONS, number) for number in range(400))),
        ("countdown", (countdown(QUESTIONS, number) for number in range(200))),
    ):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
