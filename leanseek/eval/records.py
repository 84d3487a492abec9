"""What became of every question, a line of JSON each, written when it is known: to look into, and to go on from."""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

from leanseek.config import BadInput


def fingerprint(what: Any) -> str:
    """Sixteen hexadecimal digits of anything JSON can hold."""
    return blake2b(json.dumps(what, sort_keys=True, ensure_ascii=False).encode(), digest_size=8).hexdigest()


class Records:
    """`known`: by the number of its question, what earlier calls with the same settings found.

    The settings are in the file's name, so that other weights, questions or settings never meet these lines.
    """

    def __init__(self, folder: Path, name: str, settings: Any) -> None:
        self.path = folder / f"{name}.{fingerprint(settings)}.jsonl"
        self.known: dict[int, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        whole = 0
        raw = self.path.read_bytes() if self.path.exists() else b""
        for line in raw.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # half a line: whoever wrote it was killed
            try:
                row = json.loads(line)
                self.known[row["question"]] = row
            except (ValueError, KeyError, TypeError):
                raise BadInput(f"{self.path}: line {len(self.known) + 1} is damaged: remove the file") from None
            whole += len(line)
        if whole < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def add(self, question: int, row: dict[str, Any]) -> None:
        self.known[question] = row = {"question": question} | row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
