"""What a filter and an anneal are worth: bits per byte of held-out text at equal tokens, each taken out again.

    python -m scripts.data_worth OUT --text FILE… --validation FILE --good FILE --bad FILE
        [--seeds 3] [--recipe nano] [key=value …]

A judge learns from the first texts of GOOD and BAD and divides TEXT into the best fifth of its bytes, the next three
tenths and the other half. Trained are: all of it; the better half alone (filter); all of it and, for the last fifth of
the tokens, the best fifth alone (anneal); both. Every run has the same tokenizer and validation. What is there is not
done again. Prints the table.
"""

import argparse
import json
import statistics
from itertools import islice
from pathlib import Path

import numpy as np

from leanseek.config import read_recipe
from leanseek.data.classifier import Classifier
from leanseek.data.prepare import prepare
from leanseek.data.read import read_texts
from leanseek.data.words import WordHashes, Words
from leanseek.train.pretrain import pretrain

EXAMPLES = 300  # of each kind
BOUNDS = {"best": 0.2, "good": 0.5, "rest": 1.0}  # shares of the bytes, from the best down
LATE = 0.2  # share of the tokens that an anneal takes
WAYS = {"all": (False, False), "filter": (True, False), "anneal": (False, True), "filter and anneal": (True, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    for name in ("validation", "good", "bad"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_intermixed_args()
    out: Path = asked.out
    if not (out / "data").exists():
        divide(asked.text, asked.good, asked.bad, out)
        prepare([f"{name}={out / name}.jsonl" for name in BOUNDS], out / "data", validation=[str(asked.validation)])
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in range(asked.seeds):
        for name, (filtered, annealed) in WAYS.items():
            stages = f"stages=[{', '.join(stage(*part) for part in parts(filtered, annealed))}]"
            config = read_recipe(asked.recipe, (*asked.overrides, f"train.seed={seed}", stages))
            receipt = pretrain(config, out / "data", out / "runs" / f"{name.replace(' ', '-')}-{seed}")
            found[name].append(receipt["bpb"])
            print(f"{name}, seed {seed}: {receipt['bpb']:.4f}", flush=True)
    print("| | bits per byte, by seed | median | less than `all`, by seed |\n|---|---|---|---|")
    for name, bits in found.items():
        gains = ", ".join(f"{before - after:+.4f}" for before, after in zip(found["all"], bits, strict=True))
        print(f"| {name} | {', '.join(f'{each:.4f}' for each in bits)} | {statistics.median(bits):.4f} | {gains} |")


def divide(files: list[Path], good: Path, bad: Path, out: Path) -> None:
    """Writes OUT/best.jsonl, good.jsonl and rest.jsonl: the texts by the judge's rank, cut at shares of the bytes."""
    out.mkdir(parents=True, exist_ok=True)
    hashes = WordHashes()
    judge = Classifier.learn(*([text for text, _ in islice(read_texts(file, print), EXAMPLES)] for file in (good, bad)))
    print(f"the judge tells {judge.accuracy:.1%} of the examples that were held out")
    texts = [text for file in files for text, _ in read_texts(file, print)]
    order = np.argsort([-judge.score(Words(text, hashes)) for text in texts], kind="stable")
    sizes = np.cumsum([len(texts[i].encode()) for i in order])
    begun = 0
    for name, share in BOUNDS.items():
        ended = int(np.searchsorted(sizes, share * sizes[-1], side="right"))
        rows = (json.dumps({"text": texts[i]}) + "\n" for i in order[begun:ended])
        (out / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        begun = ended


def parts(filtered: bool, annealed: bool) -> list[tuple[float, tuple[str, ...]]]:
    """The stages of a run: each one's share of the tokens and its sources, which count by their size."""
    whole = ("best", "good") if filtered else tuple(BOUNDS)
    return [(1 - LATE, whole), (LATE, ("best",))] if annealed else [(1.0, whole)]


def stage(share: float, sources: tuple[str, ...]) -> str:
    mixture = ", ".join(f"{name} = 1.0" for name in sources)
    return f"{{ sequence_length = 256, share = {share}, mixture = {{ {mixture} }}, temperature = 1.0 }}"


if __name__ == "__main__":
    main()
