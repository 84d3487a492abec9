"""Peak memory and time of `prepare` against the size of its input, under a limit.

    python -m scripts.data_scale FILE.jsonl.zst... [--sizes 0.25,0.5,1] [--limit 1.5]

Writes inputs of so many GB, cut from the files' documents and made different from pass to pass, runs `leanseek prepare`
with two workers on each, in turn, and prints the largest memory of all its processes together that was seen: what is
theirs alone (anonymous), and the whole with files that are mapped. The limit, in GiB, is set for each process.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from leanseek.data.read import read_texts


def documents(files: list[Path], size: float) -> Iterator[str]:
    """JSONL rows of about `size` bytes; each pass over the files swaps words, so that no document is seen twice."""
    written, round_ = 0, 0
    while True:
        for file in files:
            for text, _ in read_texts(file, print):
                words = text.split(" ")
                if round_:
                    words[:: round_ + 1] = [f"{word}{round_}" for word in words[:: round_ + 1]]
                row = json.dumps({"text": " ".join(words)}, ensure_ascii=False) + "\n"
                yield row
                written += len(row.encode())
                if written >= size:
                    return
        round_ += 1


def memory(root: int) -> tuple[int, int]:
    """Bytes of a process and all below it: anonymous, and resident in all."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
    family, grows = {root}, True
    while grows:
        more = {pid for pid, parent in parents.items() if parent in family} - family
        family, grows = family | more, bool(more)
    anonymous = resident = 0
    for pid in family:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Rss")}
        anonymous += values.get("RssAnon", 0)
        resident += sum(values.values())
    return anonymous, resident


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--sizes", default="0.25,0.5,1", help="GB")
    parser.add_argument("--limit", type=float, default=1.5, help="GiB of data of each process")
    asked = parser.parse_args()
    limit = int(asked.limit * 2**30)
    with tempfile.TemporaryDirectory() as folder:
        for size in map(float, asked.sizes.split(",")):
            file, out = Path(folder) / "in.jsonl", Path(folder) / f"D{size}"
            with file.open("w", encoding="utf-8") as stream:
                stream.writelines(documents(asked.files, size * 1e9))
            command = [sys.executable, "-m", "leanseek", "prepare", str(file), "--out", str(out), "--workers", "2"]
            began, cpu = time.monotonic(), os.times()
            child = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
            )
            peaks = (0, 0)
            while child.poll() is None:
                peaks = tuple(map(max, peaks, memory(child.pid)))  # type: ignore[assignment]
                time.sleep(0.2)
            after = os.times()
            seconds = after.children_user + after.children_system - cpu.children_user - cpu.children_system
            assert child.stdout is not None
            assert child.stderr is not None
            if child.returncode:
                print(f"{size:g} GB: {child.stderr.read().strip()}")
                continue
            of_its_own, in_all = (f"{peak / 2**20:,.0f}" for peak in peaks)
            print(
                f"{file.stat().st_size / 1e9:.2f} GB  {of_its_own} MiB of its own, {in_all} in all  "
                f"{time.monotonic() - began:,.0f} s, {seconds:,.0f} CPU-s  "
                + "; ".join(line.strip() for line in child.stderr.read().splitlines())
            )
            print("   " + "; ".join(child.stdout.read().splitlines()), flush=True)


if __name__ == "__main__":
    main()
