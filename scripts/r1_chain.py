"""The R1 chain as one command: cold start, GRPO, rejection sampling, SFT of the base model, GRPO; the table at the end.

    python -m scripts.r1_chain BASE OUT --demonstrations CHATS.jsonl --task TASK.jsonl [--chats CHATS.jsonl]
        [--all-round TASK.jsonl] [--dev TASK.jsonl] [--samples 4] [STAGE:section.key=value …]

The same command again goes on, at every stage. STAGE is cold, reasoning, sft or all-round.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from leanseek.post.chain import Chain, r1, table
from leanseek.post.distill import SAMPLED, Choice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    for name, needed in (("demonstrations", True), ("task", True), ("chats", False), ("all-round", False)):
        parser.add_argument(f"--{name}", type=Path, required=needed)
    parser.add_argument("--dev", type=Path)
    parser.add_argument("--samples", type=int, default=SAMPLED.samples)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--limit", type=int, help="questions that are answered for the samples")
    parser.add_argument("overrides", nargs="*", metavar="STAGE:section.key=value")
    asked = parser.parse_intermixed_args()
    overrides: dict[str, list[str]] = {}
    for told in asked.overrides:
        stage, _, override = told.partition(":")
        overrides.setdefault(stage, []).append(override)
    sampled = replace(SAMPLED, samples=asked.samples, max_tokens=asked.max_tokens, limit=asked.limit)
    files = asked.demonstrations, asked.task, asked.chats, asked.all_round, asked.dev
    chain = Chain(*files, overrides, sampled, Choice(thoughts=True))
    print(table(r1(asked.base, chain, asked.out)))


if __name__ == "__main__":
    main()
