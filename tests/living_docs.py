"""The parts of the documents that the program writes itself, and what else a document may not get wrong.

Between `<!-- help: leanseek VERB -->` and `<!-- /help -->` stands the verb's own help text, between `<!-- tree -->` and
`<!-- /tree -->` the files of leanseek/ with the first sentence of each. `python -m tests.living_docs` rewrites both in
place; `test_house.py` fails when they are out of date, when a link leads nowhere, and when a document names a file, a
symbol of a file or a recipe key that does not exist.
"""

import ast
import io
import os
import re
import textwrap
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import typer
from pydantic import BaseModel

from leanseek.cli import app
from leanseek.config import Config

ROOT = Path(__file__).parent.parent
WIDTH = 120
HELP_WIDTH = 100

BLOCK = re.compile(
    r"^<!-- (?P<kind>help|tree)(?:: leanseek(?P<verb>(?: [\w-]+)+)?)? -->\n.*?^<!-- /(?P=kind) -->$",
    re.DOTALL | re.MULTILINE,
)
MARKER = re.compile(r"^<!-- /?(?:help|tree)\b.*-->$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?P<path>(?:[\w.-]+/)*[\w-]+\.py|(?:leanseek/)?recipes/[\w-]+\.toml)(?: · (?P<symbol>[\w.]+))?")
KEY = re.compile(r"(?:model|train|optimizer|schedule|data|stages|cost)(?:\.[a-z_]\w*)+")
NAMES_THE_PAST = ("docs/log.md",)  # a diary may name what is no longer there


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


# ── what the program writes ───────────────────────────────────────────────────────────────────────────────────────


def rendered(text: str) -> str:
    """A document with every block as it should be."""

    def block(match: re.Match[str]) -> str:
        first, last = match[0].split("\n", 1)[0], match[0].rsplit("\n", 1)[1]
        body = tree(ROOT / "leanseek") if match["kind"] == "tree" else help_text((match["verb"] or "").strip())
        return f"{first}\n```text\n{body}\n```\n{last}"

    return BLOCK.sub(block, text)


def broken_markers(text: str) -> list[str]:
    """Markers that open or close nothing: what stands there would never be brought up to date."""
    return MARKER.findall(BLOCK.sub("", text))


def help_text(verb: str) -> str:
    """What `leanseek VERB --help` prints on a wide terminal without colours; the list of verbs for ""."""
    printed = io.StringIO()
    with patch.dict(os.environ, {"COLUMNS": str(HELP_WIDTH), "NO_COLOR": "1"}), redirect_stdout(printed):
        app([*verb.split(), "--help"], prog_name="leanseek", standalone_mode=False)
    return "\n".join(line.rstrip() for line in printed.getvalue().strip("\n").split("\n"))


def verbs() -> list[str]:
    """Every verb of the command line."""
    return [
        *_commands(app),
        *(f"{sub.name} {verb}" for sub in app.registered_groups for verb in _commands(sub.typer_instance)),
    ]


def _commands(of: typer.Typer | None) -> list[str]:
    assert of is not None
    return [str(command.name or getattr(command.callback, "__name__", "")) for command in of.registered_commands]


def tree(folder: Path) -> str:
    """The files of a folder, each with its first sentence; files that say nothing stand alone."""
    rows = _rows(folder, "")
    column = max(len(drawn) for drawn, _, _ in rows) + 2
    lines = [f"{folder.name}/"]
    for drawn, below, sentence in rows:
        first, *more = textwrap.wrap(sentence, WIDTH - column) or [""]
        lines.append(f"{drawn:<{column}}{first}".rstrip())
        lines += [f"{below:<{column}}{line}" for line in more]
    return "\n".join(lines)


def _rows(folder: Path, bars: str) -> list[tuple[str, str, str]]:
    """Of each entry below a folder: its drawn name, the bars under it, its sentence."""
    rows: list[tuple[str, str, str]] = []
    entries = [entry for entry in sorted(folder.iterdir(), key=_place) if _shown(entry)]
    for entry in entries:
        last = entry == entries[-1]
        drawn, below = bars + ("└── " if last else "├── "), bars + ("    " if last else "│   ")
        if entry.is_dir():
            rows += [(f"{drawn}{entry.name}/", below, ""), *_rows(entry, below)]
        else:
            rows.append((drawn + entry.name, below, first_sentence(entry.read_text(encoding="utf-8"), entry.suffix)))
    return rows


def _place(entry: Path) -> tuple[bool, str]:
    return entry.is_dir(), entry.name


def _shown(entry: Path) -> bool:
    if entry.is_dir():
        return entry.name != "__pycache__" and any(_shown(inner) for inner in entry.iterdir())
    return entry.suffix in (".py", ".toml") and entry.stat().st_size > 0


def first_sentence(source: str, suffix: str) -> str:
    """Of a module's docstring, or of the comment that a recipe begins with."""
    if suffix == ".py":
        text = ast.get_docstring(ast.parse(source)) or ""
    else:
        comment = re.match(r"(?:#.*\n)*", source)
        text = re.sub(r"^# ?", "", comment[0] if comment else "", flags=re.MULTILINE)
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", paragraph)[0]


# ── what a document may not get wrong ─────────────────────────────────────────────────────────────────────────────


def dead_links(text: str, place: Path) -> list[str]:
    """Relative links of a document at `place` that lead to no file, or to no heading of it."""
    dead = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = (place.parent / path).resolve() if path else place
        there = file.exists() or file == place
        if there and heading:
            content = text if file == place else file.read_text(encoding="utf-8")
            there = heading in {_anchor(title) for title in HEADING.findall(FENCE.sub("", content))}
        if not there:
            dead.append(target)
    return dead


def _anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def wrong_names(text: str) -> list[str]:
    """Files, symbols (`file.py · Symbol`) and recipe keys in back quotes that do not exist."""
    wrong = []
    for span in SPAN.findall(FENCE.sub("", text)):
        if match := FILE.fullmatch(span):
            file = next((p for p in (ROOT / "leanseek" / match["path"], ROOT / match["path"]) if p.is_file()), None)
            if file is None:
                wrong.append(f"{span}: no such file")
            elif match["symbol"] and match["symbol"] not in symbols(file.read_text(encoding="utf-8")):
                wrong.append(f"{span}: no such symbol")
        elif KEY.fullmatch(span) and not _has_key(Config, span.split(".")):
            wrong.append(f"{span}: no such key")
    return wrong


def symbols(source: str) -> set[str]:
    """Everything a module defines at its top, and `Class.member`."""
    return set(_defined(ast.parse(source).body, ""))


def _defined(body: Iterable[ast.stmt], prefix: str) -> Iterable[str]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from _defined(node.body, f"{prefix}{node.name}.")
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name
            case ast.Assign(targets=targets):
                for target in targets:
                    yield from (prefix + name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def _has_key(schema: type[BaseModel], path: list[str]) -> bool:
    if path[0] not in schema.model_fields:
        return False
    return len(path) == 1 or any(
        _has_key(inner, path[1:]) for inner in _models_in(schema.model_fields[path[0]].annotation)
    )


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def main() -> None:
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if (new := rendered(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: brought up to date")


if __name__ == "__main__":
    main()
