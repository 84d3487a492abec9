"""Triton kernels without a GPU: run by the interpreter, compiled ahead of time; each in a process of its own.

The interpreter is chosen when Triton is imported, and with it nothing can be compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.living_docs import ROOT

COMPILE = """
import dataclasses, json, sys
from leanseek.bench.resources import resources
print(json.dumps([dataclasses.asdict(row) for row in resources(int(sys.argv[1]))]))
"""


def run(*command: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_kernels_are_their_references_under_the_interpreter() -> None:
    # NumPy warns of what the interpreter divides by zero, as a GPU would not.
    told = run("-m", "pytest", "tests/interpreted", "-W", "ignore::RuntimeWarning", TRITON_INTERPRET="1")
    assert " passed" in told
    assert "skipped" not in told


def compiled(capability: int, cache: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(run("-c", COMPILE, str(capability), TRITON_CACHE_DIR=str(cache)))
    return rows


def test_kernels_compile_for_hopper_without_spilling(tmp_path: Path) -> None:
    rows = compiled(90, tmp_path)
    assert {row["kernel"] for row in rows} == {
        "_tiles", "_columns", "_blocks", "_normed", "_fp8_matmul", "_fp8_weight_gradient", "_grouped",
        "_weight_gradient", "_spread", "_collect", "_losses", "_turn", "_decode", "_joined",
    }  # fmt: skip
    assert [row for row in rows if row["spilled"]] == []
    assert max(row["registers"] for row in rows) <= 255
    for row in rows:
        if row["kernel"] in ("_fp8_matmul", "_fp8_weight_gradient", "_grouped"):
            assert row["engines"] == ["wgmma", "TMA"], row  # tensor cores and copy engine, not their substitutes


@pytest.mark.slow
def test_kernels_compile_for_blackwell(tmp_path: Path) -> None:
    rows = compiled(100, tmp_path)
    for row in rows:
        assert row["spilled"] <= 8, row  # the largest decoding kernel has two values too many
        if row["kernel"] in ("_fp8_matmul", "_fp8_weight_gradient", "_grouped"):
            assert row["engines"] == ["tcgen05", "TMA"], row
