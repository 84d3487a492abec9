"""The rules of the house: who may import whom, what starts quickly, and documents that do not lie.

For the table every import counts, inside functions and for the type checker alone too: it says what a room may know.
For cycles those count that can happen while the program runs; naming a type for the checker imports nothing.
"""

import ast
import graphlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests import living_docs
from tests.living_docs import NAMES_THE_PAST, ROOT, broken_markers, dead_links, documents, rendered, verbs, wrong_names

EVERYTHING = frozenset({"everything"})
SERVE = frozenset({"model", "ops", "parallel", "checkpoint", "hub", "data.tokenizer"})
EVAL = frozenset({"data", "model", "ops", "serve", "checkpoint"})
TRAIN = frozenset({"data", "model", "ops", "parallel", "checkpoint", "weightfiles", "plan.count"})
WEIGHTS = frozenset({"model", "parallel", "ops.fp8", "data.tokenizer", "weightfiles"})

# Beside its own room and `config`, which all may import. The longest name that fits a module is its row.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "config": frozenset(),
    "recipes": frozenset(),
    "ops": frozenset(),
    "plan": frozenset({"parallel.timetable", "parallel.placement"}),
    "data": frozenset(),
    "model": frozenset({"ops"}),
    "parallel": frozenset({"model", "ops"}),
    "checkpoint": WEIGHTS,
    "weightfiles": frozenset(),
    "hub": WEIGHTS | {"checkpoint"},
    "gguf": WEIGHTS | {"checkpoint", "hub"},
    "peft": WEIGHTS | {"checkpoint", "hub"},
    "serve": SERVE,
    "eval": EVAL,
    "train": TRAIN,
    "train.pretrain": TRAIN | {"eval"},
    "post": frozenset({"train", "serve", "eval", "peft"}) | TRAIN | SERVE | EVAL,
    "bench": EVERYTHING,
    "demo": EVERYTHING,
    "report": EVERYTHING,
    "cli": EVERYTHING,
    "__init__": EVERYTHING,
    "__main__": EVERYTHING,
}
# What is loaded before a verb is known imports its rooms when it is called, and what may import everything is itself
# imported only when it is called.
AT_CALL_TIME = ("__init__", "cli")
LOADED_WHEN_CALLED = ("bench", "demo", "report")
WITHOUT_TORCH = ("plan", "data")
NAMES_TORCH_DISTRIBUTED = ("parallel", "checkpoint")
HEAVY = {"torch", "numpy", "tokenizers", "safetensors", "matplotlib", "jinja2", "fastapi", "uvicorn", "zstandard"} | {
    "nh3",
    "markdown_it",
    "numba",
    "prometheus_client",
    "llguidance",
}

PACKAGE = "leanseek"


@dataclass(frozen=True)
class Import:
    target: str  # dotted, as written in full; ours without "leanseek.", and "__init__" for the package itself
    ours: bool
    when: Literal["load", "call", "typing"]
    line: int


def sources() -> dict[str, str]:
    """Source by module: "model.mla", "model" for a room's __init__, "__init__" for the package's own."""
    root = ROOT / PACKAGE
    return {_name(path.relative_to(root)): path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))}


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(module: str, source: str, modules: set[str]) -> list[Import]:
    """Every import of a module, `import_module` with a constant name included."""
    found: list[Import] = []
    rooms = {name.partition(".")[0] for name in modules if "." in name}
    known = modules | rooms | set(MAY_IMPORT)
    package = module if module in rooms else module.rpartition(".")[0]

    def add(target: str, when: Literal["load", "call", "typing"], line: int) -> None:
        if target.partition(".")[0] != PACKAGE:
            found.append(Import(target, False, when, line))
            return
        name = target.partition(".")[2]
        while name and name not in known:  # the last words are what a module defines
            name = name.rpartition(".")[0]
        found.append(Import(name or "__init__", True, when, line))

    def visit(node: ast.AST, when: Literal["load", "call", "typing"]) -> None:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    add(alias.name, when, node.lineno)
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    above = f"{PACKAGE}.{package}".rstrip(".").split(".")
                    base = ".".join([*above[: len(above) - level + 1], *([base] if base else [])])
                for alias in names:
                    add(f"{base}.{alias.name}", when, node.lineno)
            case ast.Call(args=[ast.Constant(value=str(target)), *_], func=function):
                called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                if called in ("import_module", "__import__"):
                    add(target, when, node.lineno)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if when == "load":
                when = "call"
            case ast.If(test=test) if ast.unparse(test).endswith("TYPE_CHECKING"):
                for inner in node.body:
                    visit(inner, "typing")
                for inner in node.orelse:
                    visit(inner, when)
                return
        for child in ast.iter_child_nodes(node):
            visit(child, when)

    visit(ast.parse(source), "load")
    return found


def _fits(module: str, names: tuple[str, ...] | frozenset[str] | dict[str, frozenset[str]]) -> str | None:
    """The longest of the dotted names that the module is, or lies below."""
    return max((name for name in names if module == name or module.startswith(f"{name}.")), key=len, default=None)


def violations(tree: dict[str, str]) -> list[str]:
    """Every breach of the rules about imports, a line each."""
    wrong: list[str] = []
    graph: dict[str, set[str]] = {}
    for module, source in tree.items():
        row = _fits(module, MAY_IMPORT)
        if row is None:
            wrong.append(f"{module}: no row of the table is its own")
            continue
        allowed = MAY_IMPORT[row]
        found = imports(module, source, set(tree))
        graph[module] = {i.target for i in found if i.ours and i.when != "typing" and i.target != module}
        for i in found:
            where = f"{module} line {i.line}: {i.target}"
            if not i.ours:
                if _fits(i.target, ("torch",)) and _fits(module, WITHOUT_TORCH):
                    wrong.append(f"{where}: a room without torch")
                continue
            same_room = i.target.partition(".")[0] == module.partition(".")[0]
            if not (same_room or i.target == "config" or allowed is EVERYTHING or _fits(i.target, allowed)):
                wrong.append(f"{where}: not in the row of {row}")
            if i.when == "load" and i.target != "config" and _fits(module, AT_CALL_TIME):
                wrong.append(f"{where}: import it where it is called")
            if i.when == "load" and not same_room and _fits(i.target, LOADED_WHEN_CALLED):
                wrong.append(f"{where}: import it where it is called")
        named = "torch.distributed" in source or any(_fits(i.target, ("torch.distributed",)) for i in found)
        if named and not _fits(module, NAMES_TORCH_DISTRIBUTED):
            wrong.append(f"{module}: names torch.distributed")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        wrong.append("cycle: " + " → ".join(error.args[1]))
    return wrong


def test_rooms_import_what_they_may() -> None:
    assert not violations(sources())


def test_the_table_itself_has_no_cycle() -> None:
    rooms = {row: set(allowed) for row, allowed in MAY_IMPORT.items() if allowed is not EVERYTHING}
    rooms["train"] |= rooms.pop("train.pretrain")  # one room; the pages of `parallel` that `plan` reads are apart
    assert len(list(graphlib.TopologicalSorter(rooms).static_order())) >= len(rooms)  # raises CycleError on a cycle


# Each offence is planted into a tree whose files are otherwise empty: the module, its source, and what must be said.
OFFENCES = [
    ("model.mla", "from leanseek.train.step import train_step", "not in the row of model"),
    ("model.mla", "def f():\n    from leanseek.parallel import mesh", "not in the row of model"),
    (
        "model.mla",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import leanseek.data.loader",
        "not in the row",
    ),
    ("model.mla", "from ..data import loader", "not in the row of model"),
    ("model.mla", "from leanseek import load", "not in the row of model"),
    ("model.mla", "import importlib\nimportlib.import_module('leanseek.data.loader')", "not in the row of model"),
    ("serve.engine", "from leanseek.data.loader import Loader", "not in the row of serve"),
    ("serve.engine", "from leanseek.data import loader", "not in the row of serve"),
    ("serve.engine", "from leanseek import train", "not in the row of serve"),
    ("train.loop", "import leanseek.eval.bpb", "not in the row of train"),
    ("train.loop", "from leanseek.plan import hardware", "not in the row of train"),
    ("checkpoint", "from leanseek.ops.loss import IGNORE", "not in the row of checkpoint"),
    ("checkpoint", "from leanseek.hub import layout", "not in the row of checkpoint"),
    ("weightfiles", "from leanseek.checkpoint import newest", "not in the row of weightfiles"),
    ("hub", "from leanseek.serve.engine import LLM", "not in the row of hub"),
    ("hub", "def f():\n    from leanseek.gguf import export_gguf", "not in the row of hub"),
    ("config", "from leanseek.data.shards import Data", "not in the row of config"),
    ("eval.bpb", "def f():\n    import leanseek.demo", "not in the row of eval"),
    ("attic.old", "", "no row of the table"),
    ("cli", "from leanseek.train.pretrain import pretrain", "import it where it is called"),
    ("__init__", "from leanseek.serve.engine import LLM", "import it where it is called"),
    ("__main__", "from leanseek.demo import demo", "import it where it is called"),
    ("plan.count", "def f():\n    import torch", "a room without torch"),
    ("data.loader", "from torch.utils.data import Dataset", "a room without torch"),
    ("data.loader", "import importlib\nimportlib.import_module('torch')", "a room without torch"),
    ("train.loop", "import torch\ntorch.distributed.barrier()", "names torch.distributed"),
    ("train.loop", "from torch import distributed as dist", "names torch.distributed"),
    ("ops.loss", "from leanseek.ops.attention import attention", None),
    ("ops.attention", "from leanseek.config import Config", None),
    ("train.pretrain", "from leanseek.eval.harness import evaluate", None),
    ("serve.engine", "from leanseek.data import tokenizer", None),
    ("cli", "def f():\n    import leanseek.demo", None),
    ("data.loader", "import torchless", None),
]


@pytest.mark.parametrize(("module", "source", "said"), OFFENCES)
def test_each_offence_is_seen(module: str, source: str, said: str | None) -> None:
    seen = violations(dict.fromkeys(sources(), "") | {module: source})
    if said is None:
        assert not seen
    else:
        assert len(seen) == 1, seen
        assert seen[0].startswith(module)
        assert said in seen[0]


def test_cycles_are_seen_and_types_make_none() -> None:
    tree = dict.fromkeys(sources(), "")
    back = "def f():\n    from leanseek.ops.loss import IGNORE"
    there = {"ops.loss": "from leanseek.ops.routing import route"}
    assert violations(tree | there | {"ops.routing": back})[0].startswith("cycle: ")
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from leanseek.ops.loss import IGNORE"
    assert not violations(tree | there | {"ops.routing": for_types})


# ── what is loaded ────────────────────────────────────────────────────────────────────────────────────────────────


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after running the code."""
    told = f"import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\n{code}"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.split()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import leanseek") & (HEAVY | {"pydantic", "typer"})
    assert "numpy" in loaded_by("import leanseek.data.shards")  # this can fail


def test_asking_for_help_loads_nothing_heavy() -> None:
    help_of_all = "import runpy\nsys.argv = ['leanseek', '--help']\nrunpy.run_module('leanseek', run_name='__main__')"
    assert not loaded_by(help_of_all) & HEAVY


def test_plan_and_data_run_without_torch() -> None:
    rooms = [name for name in sources() if _fits(name, WITHOUT_TORCH)]
    assert "torch" not in loaded_by("\n".join(f"import leanseek.{name}" for name in rooms))


# ── documents ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_documents_are_in_date(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not broken_markers(text)
    assert rendered(text) == text, "run `make docs`"
    assert not dead_links(text, path)
    if path.relative_to(ROOT).as_posix() not in NAMES_THE_PAST:
        assert not wrong_names(text)


def test_every_verb_is_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [verb for verb in verbs() if f"<!-- help: leanseek {verb} -->" not in page] == []


def test_stale_blocks_are_seen() -> None:
    for kind, end in (("help: leanseek prepare", "help"), ("help: leanseek", "help"), ("tree", "tree")):
        old = f"before\n<!-- {kind} -->\nold\n<!-- /{end} -->\nafter\n"
        new = rendered(old)
        assert new != old
        assert new.startswith(f"before\n<!-- {kind} -->\n```text\n")
        assert new.endswith(f"\n```\n<!-- /{end} -->\nafter\n")
        assert rendered(new) == new
    assert "--vocab-size" in rendered("<!-- help: leanseek prepare -->\n<!-- /help -->")
    assert broken_markers("<!-- tree -->\n<!-- /help -->\n") == ["<!-- tree -->", "<!-- /help -->"]
    with pytest.raises(Exception, match="No such command"):
        rendered("<!-- help: leanseek nonesuch -->\n<!-- /help -->")


def test_the_tree_says_each_first_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "house"
    (folder / "room" / "__pycache__").mkdir(parents=True)
    (folder / "room" / "__pycache__" / "a.py").write_text('"""No."""')
    (folder / "room" / "__init__.py").touch()
    (folder / "room" / "a.py").write_text('"""Sums (report eq. 3 and\n§4.2). More.\n"""')
    (folder / "b.py").write_text(f'"""{"word " * 42}end."""')
    (folder / "c.toml").write_text('# Small. And more.\nkey = "value"\n')
    (folder / "d.py").write_text("x = 1\n")
    words = "word " * 21  # what fits into 120 columns beside the tree
    assert living_docs.tree(folder).splitlines() == [
        "house/",
        f"├── b.py      {words.strip()}",
        f"│             {words.strip()}",
        "│             end.",
        "├── c.toml    Small.",
        "├── d.py",
        "└── room/",
        "    └── a.py  Sums (report eq. 3 and §4.2).",
    ]


def test_dead_links_are_seen(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A title: `x`, y\n")
    good = (
        "# Here\n[a](there.md) [b](there.md#a-title-x-y) [c](#here) [d](https://example.org/x)\n```\n[e](no.md)\n```\n"
    )
    bad = "[a](gone.md) ![b](img/gone.png) [c](there.md#other) [d](#nowhere)"
    assert dead_links(good, tmp_path / "page.md") == []
    assert dead_links(bad, tmp_path / "page.md") == ["gone.md", "img/gone.png", "there.md#other", "#nowhere"]


def test_wrong_names_are_seen() -> None:
    good = (
        "`model/mla.py` `tests/test_house.py` `recipes/nano.toml` `model/mla.py · MLA.direct` `train.seed` "
        "`config.py · ModelConfig.q_lora_rank` `ops/loss.py · IGNORE` `model.rope_scaling.mscale` "
        "`stages.sequence_length`"
    )
    bad = (
        "`model/mlp.py` `recipes/huge.toml` `model/mla.py · MLA.undirect` `model/mla.py · softmax_scale` "
        "`train.sede` `model.rope_scaling.nscale`"
    )
    assert wrong_names(good) == []
    assert [line.partition(": ")[0] for line in wrong_names(bad)] == [span.strip("`") for span in bad.split("` `")]
