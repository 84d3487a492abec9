"""Does SFT teach a small model to answer? A base model of the storyworld, its chats, and what came of them.

    python scripts/story_chats.py [--base RUN] [--out build/story-chats] [--tokens 2e6] [--chats 2500] [--asked 200]

Trains the demo's recipe on the project's own stories, then on its conversations (`leanseek sft`), and asks both models
requests whose stories neither has seen, drawn at temperature 0.6 and top-p 0.95. Shown: the share of answers that end
by themselves and are well formed, held-out answers in bits per byte before and after, lengths beside the references'.
The base is RUN, as `leanseek demo` leaves one, or made first. Fifteen CPU-minutes; the same command again goes on.
"""

import argparse
import json
import re
import statistics
from itertools import count, islice
from pathlib import Path
from typing import Any

import leanseek
from leanseek.config import read_recipe
from leanseek.data.prepare import prepare
from leanseek.data.storyworld import QUESTIONS, chats
from leanseek.demo import write_chats
from leanseek.eval.statistics import interval
from leanseek.post.sft import sft
from leanseek.serve.llm import LLM, Completion
from leanseek.serve.sampling import Sampling
from leanseek.train.pretrain import pretrain

SPECIAL = re.compile(r"<[｜|]|<think>|</think>")
LEAST_ENDED, MOST_APART, LEAST_GAINED = 0.95, 2.0, 0.10  # what is asked of the answers; bits per byte, a tenth less


def well_formed(completion: Completion) -> bool:
    """Ended by itself, says something, and speaks no token of the template; a story of its own ends a sentence."""
    text = completion.text.strip()
    return completion.finish_reason == "stop" and bool(text) and not SPECIAL.search(text) and "\ufffd" not in text


def held_out(asked: int, longest: int, llm: LLM) -> list[dict[str, Any]]:
    """First turns of conversations that nobody was trained on, and what the storyworld answers."""
    every = (row["messages"] for number in count() for row in chats(QUESTIONS, number, 1000))
    fits = (m for m in every if len(llm.tokenizer.encode_chat(m[:2], add_generation_prompt=False)) <= longest)
    return [{"asked": m[:1], "answer": m[1]["content"]} for m in islice(fits, asked)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/story-chats"))
    parser.add_argument("--tokens", type=float, default=2e6)
    parser.add_argument("--chats", type=int, default=2_500)
    parser.add_argument("--asked", type=int, default=200)
    asked = parser.parse_args()
    data, file, run = (asked.out / name for name in ("data", "chats.jsonl", "chat"))
    base = asked.base or asked.out / "base"
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.base is None:
        recipe = read_recipe("demo", [f"train.tokens={round(asked.tokens)}", "train.dtype=fp32"])
        if not (data / "manifest.json").exists():
            prepare(["storyworld:8MB"], data, recipe.model.vocab_size, validation=["storyworld:200KB"])
        pretrain(recipe, data, base)
    if not file.exists():
        write_chats(file, asked.chats)
    receipt = sft(base, file, run)

    llm = leanseek.load(run)
    rows = held_out(asked.asked, 256, llm)
    references = [len(llm.tokenizer.encode(row["answer"])) for row in rows]
    prompts = [row["asked"] for row in rows]
    sampling = Sampling(temperature=0.6, top_p=0.95, max_tokens=256, seed=1)
    print(f"{'':<6} {'well formed and ended':<32} {'bpb of answers':<16} median length in tokens")
    found: dict[str, Any] = {}
    for name, path in (("base", base), ("chat", run)):
        told = leanseek.load(path).chat_many(prompts, sampling)
        ended = [float(well_formed(one)) for one in told]
        _, low, high = interval(ended)
        bpb = receipt["before" if name == "base" else "after"]["bpb"]
        lengths = statistics.median(len(one.token_ids) for one in told)
        found[name] = {"ended": statistics.fmean(ended), "bpb": bpb, "length": lengths}
        share = f"{statistics.fmean(ended):.1%} ({low:.1%} to {high:.1%})"
        print(f"{name:<6} {share:<32} {bpb:<16.4f} {lengths:g}, references {statistics.median(references):g}")
    for key in ("drafts_accepted", "max_violation"):
        print(f"{key}: before {receipt['before'][key]:.3f}, after {receipt['after'][key]:.3f}")
    apart = found["chat"]["length"] / statistics.median(references)
    held = {
        f"ended at least {LEAST_ENDED:.0%}": found["chat"]["ended"] >= LEAST_ENDED,
        f"bits per byte {LEAST_GAINED:.0%} below the base's": found["chat"]["bpb"]
        <= (1 - LEAST_GAINED) * found["base"]["bpb"],
        f"length within {MOST_APART:g} times": 1 / MOST_APART <= apart <= MOST_APART,
    }
    print(json.dumps(held, indent=1))
    if not all(held.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
