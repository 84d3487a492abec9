"""Rejection sampling: what a model that reasons well writes becomes what another one learns (report §5.1, §5.4.1).

Every question is answered several times; of the right answers those stay that are well formed, in one language and not
long-winded, the shortest first. V3's two kinds of sample come of a question: <problem, original response>, where the
task has one, and <system prompt, problem, response>, whose system prompt asks for reflection and verification.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leanseek import checkpoint
from leanseek.config import BadInput
from leanseek.eval.ask import Settings, ask, tell, warnings
from leanseek.eval.formats import Item
from leanseek.eval.harness import weights_of
from leanseek.eval.tasks import Task, chosen, read_task
from leanseek.parallel.mesh import refuse_many
from leanseek.post.replies import FENCE, language_share, longest_paragraph, parts_of
from leanseek.serve.llm import LLM

REFLECT = (
    "Think step by step before you answer. When you have a result, look back at how you came to it, verify it in "
    "another way, and mend what was wrong. Then give the answer, short and clear."
)


@dataclass(frozen=True)
class Choice:
    """Which replies are kept. Raises BadInput.

    keep: most of one question, the shortest first. longest: tokens of a reply; None: no limit. one_language: least
    share of its words that is in the question's script. paragraph: most characters of a paragraph. thoughts: whether a
    reply must have some. code: whether thoughts may have code blocks.
    """

    keep: int = 1
    longest: int | None = None
    one_language: float = 0.95
    paragraph: int = 2000
    thoughts: bool = False
    code: bool = False

    def __post_init__(self) -> None:
        for name, least in (("keep", 1), ("longest", 1), ("paragraph", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadInput(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.one_language <= 1:
            raise BadInput(f"one_language is a share, between 0 and 1, got {self.one_language}")


AS_R1_DID = Choice()
SAMPLED = Settings(samples=4, temperature=1.0, top_p=1.0)


def distill(
    run: Path, task: Path, out: Path, settings: Settings = SAMPLED, choice: Choice = AS_R1_DID
) -> dict[str, int]:
    """Writes OUT, a file of chats for SFT, from what RUN answers to a task; returns how many replies came to what.

    What was answered is kept beside OUT, in OUT.answers: the same call goes on from there, and one with another choice
    asks nothing again. OUT is whole or not there. Raises BadInput where no reply is fit to learn from.
    """
    refuse_many("distill")
    if out.suffix != ".jsonl":
        raise BadInput(f"{out}: chats are written to a .jsonl file")
    if out.is_dir():
        raise BadInput(f"{out}: there is a folder of that name")
    asked, llm = read_task(task), LLM.load(run)
    if not checkpoint.chats(run):
        settings = replace(settings, system=None)  # it goes on with text, in which there is no such message
    rows, counts = samples(llm, asked, settings, choice, out.with_name(f"{out.name}.answers"), run)
    if not rows:
        told = ", ".join(f"{count} {why}" for why, count in counts.items())
        raise BadInput(f"{out}: no reply of {run} to {task} is fit to learn from ({told}): nothing is written")
    writing = out.with_name(f".writing-{out.name}")
    with writing.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    writing.replace(out)
    return counts


def samples(
    llm: LLM, task: Task, settings: Settings, choice: Choice, folder: Path, run: Path
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The chats that come of a task, by question, and how many replies came to what; answers are kept in `folder`."""
    settings = replace(settings, write=True)
    result = ask(llm, task, settings, folder, weights_of(run), checkpoint.chats(run))
    for line in warnings(task, result, llm.config.max_position_embeddings):
        tell(line)
    lines = Path(result["records"]).read_text(encoding="utf-8").splitlines()
    answered = {row["question"]: row for row in map(json.loads, lines)}
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for number in chosen(len(task.items), settings.limit, settings.seed):
        item, row = task.items[number], answered[number]
        replies = list(fit(item, row, choice, llm, counts))
        kept = sorted(replies, key=len)[: choice.keep]
        counts["more than are kept"] += len(replies) - len(kept)
        counts["kept"] += len(kept)
        rows.extend(chats_of(item, kept, settings.system))
    return rows, {why: count for why, count in counts.items() if count}


def fit(item: Item, row: dict[str, Any], choice: Choice, llm: LLM, counts: Counter[str]) -> Iterator[str]:
    """The replies to a question that may be learnt from, each once; `counts` says why others may not."""
    seen: set[str] = set()
    replies = row.get("replies", [])
    if not replies:
        counts["too long to ask"] += len(row["right"])
    for reply, right, ended in zip(replies, row["right"], row.get("ended", []), strict=True):
        why = "wrong" if not right else "cut off" if not ended else unfit(item.question, reply, choice, llm)
        if why is None and reply.strip() in seen:
            why = "the same again"
        if why is None:
            seen.add(reply.strip())
            yield reply.strip()
        else:
            counts[why] += 1


def unfit(question: str, reply: str, choice: Choice, llm: LLM) -> str | None:
    """Why a right reply is not one to learn from, in two words; None where it is."""
    parts = parts_of(reply)
    if parts is None or (choice.thoughts and not parts.thoughts):
        return "ill formed"
    if language_share(reply, question) < choice.one_language:
        return "languages mixed"
    if choice.longest is not None and len(llm.tokenizer.encode(reply)) > choice.longest:
        return "too long"
    if longest_paragraph(reply) > choice.paragraph or (not choice.code and FENCE in (parts.thoughts or "")):
        return "hard to read"
    return None


def chats_of(item: Item, replies: list[str], system: str | None) -> Iterator[dict[str, Any]]:
    """V3's two kinds of sample: the problem with its original response, and with each reply under the system prompt.

    Without a system prompt the second kind alone. The bare result is no original response.
    """
    problem = {"role": "user", "content": item.question}
    original = item.solution.strip()
    if replies and system is not None and original not in ("", item.row["answer"]):
        yield {"messages": [problem, {"role": "assistant", "content": original}]}
    told = [] if system is None else [{"role": "system", "content": system}]
    for reply in replies:
        yield {"messages": [*told, problem, {"role": "assistant", "content": reply}]}


def say(out: Path, counts: dict[str, int]) -> None:
    """What came of the replies, for people."""
    total = sum(counts.values())
    print(f"{out}: {counts['kept']:,} of {total:,} replies kept", file=sys.stderr)
    for why, count in sorted(counts.items(), key=lambda each: -each[1]):
        if why != "kept":
            print(f"  {count:>6,} {why}", file=sys.stderr)
