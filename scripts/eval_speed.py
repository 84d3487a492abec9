"""Questions per second of lm-evaluation-harness: over our engine and over its own `hf` model, in turn, same weights.

    python scripts/eval_speed.py RUN [--rounds 5] [--questions 128] [--shots 5]

Questions are sums with four choices behind solved examples, made here. Letters: the choices are A to D, as in MMLU;
texts: they are the results themselves. The peer runs at the best of several batch sizes.
Needs `pip install 'leanseek[eval,oracle]'`.
"""

import argparse
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from leanseek.bench.turns import in_turn
from leanseek.data.puzzles import sum_of
from leanseek.eval.lm_eval import LeanSeekLM
from leanseek.hub import export_release


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def questions(count: int, shots: int, letters: bool) -> list[Request]:
    dice = random.Random(0)

    def one(number: int) -> tuple[str, list[str], int]:
        asked = sum_of(0, number)
        results = dice.sample([asked.result + off for off in (-10, -1, 0, 1, 10)], 4)
        if asked.result not in results:
            results[0] = asked.result
        listed = "".join(f"\n{letter}. {result}" for letter, result in zip("ABCD", results, strict=True))
        choices = [f" {letter}" for letter in "ABCD"] if letters else [f" {result}" for result in results]
        return f"What is {asked}?{listed}\nAnswer:", choices, results.index(asked.result)

    solved = "".join(f"{prompt}{choices[right]}\n\n" for prompt, choices, right in map(one, range(shots)))
    made = [one(shots + number) for number in range(count)]
    return [Request(solved + prompt, choice) for prompt, choices, _ in made for choice in choices]


def rate(answer: Callable[..., list[Any]], requests: list[Request]) -> Callable[[], float]:
    def measured() -> float:
        began = time.perf_counter()
        answer(requests, disable_tqdm=True)
        return len(requests) / 4 / (time.perf_counter() - began)

    return measured


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("run", type=Path)
    for name, value in (("rounds", 5), ("questions", 128), ("shots", 5)):
        arguments.add_argument(f"--{name}", type=int, default=value)
    told = arguments.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from lm_eval.models.huggingface import HFLM

    console, ours = Console(), LeanSeekLM(told.run, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        export_release(told.run, Path(folder) / "hf", "fp32")
        theirs = HFLM(pretrained=f"{folder}/hf", device="cpu", dtype="float32", add_bos_token=True)
        for letters in (True, False):
            requests = questions(told.questions, told.shots, letters)
            a, b = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
            worst = max(abs(x[0] - y[0]) for x, y in zip(a, b, strict=True))
            best = 0.0
            for size in (1, 8, 32):
                theirs.batch_size_per_gpu = size
                found = rate(theirs.loglikelihood, requests)()
                if found > best:
                    best, batch = found, size
            theirs.batch_size_per_gpu = batch
            row = in_turn(
                "letters" if letters else "texts",
                "questions/s",
                rate(ours.loglikelihood, requests),
                rate(theirs.loglikelihood, requests),
                told.rounds,
            )
            tokens = len(ours.tok_encode(requests[0].args[0]))
            times = f"{row.ratio_median:.2f} times ({row.ratio_min:.2f} to {row.ratio_max:.2f}, {row.n} rounds)"
            beside = f"hf at batch {batch}; {tokens} tokens a prompt; largest difference {worst:.1e} nats"
            console.print(
                f"{row.name}: {row.ours:.1f} against {row.peer:.1f} {row.unit}, {times}; {beside}", soft_wrap=True
            )


if __name__ == "__main__":
    main()
