"""Text that every machine with Python has: the standard library's sources, and their docstrings as prose."""

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEAST_DOCSTRING = 200  # characters


def text_at_hand(folder: Path) -> list[str]:
    """Writes code.jsonl and prose.jsonl into a folder; returns the two as inputs for `prepare`, named sources."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "code.jsonl").open("w") as code, (folder / "prose.jsonl").open("w") as prose:
        for source in _standard_library():
            code.write(json.dumps({"text": source}) + "\n")
            for docstring in _docstrings(source):
                prose.write(json.dumps({"text": docstring}) + "\n")
    return [f"code={folder / 'code.jsonl'}", f"prose={folder / 'prose.jsonl'}"]


def _standard_library() -> Iterator[str]:
    apart = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not apart & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def _docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= LEAST_DOCSTRING:
                yield docstring
