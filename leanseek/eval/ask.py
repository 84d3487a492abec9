"""Puts a task's questions to a model and says how well it did: by likelihood, or by what it writes (report §4.4.1)."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import Progress

from leanseek.config import BadInput
from leanseek.eval.formats import Item
from leanseek.eval.likelihood import Asked, Likelihood, likelihoods
from leanseek.eval.records import Records
from leanseek.eval.statistics import interval, majority, pass_at_k
from leanseek.eval.tasks import Task, as_chat, as_text, chosen, examples_for
from leanseek.eval.verify import Verifier, key_of
from leanseek.serve.engine import Request
from leanseek.serve.llm import LLM
from leanseek.serve.sampling import Sampling

AT_ONCE = 256  # questions that are read, or wait to be answered, together; what Ctrl-C may cost


@dataclass(frozen=True)
class Settings:
    """How a task is put. Raises BadInput.

    shots: solved examples before each question; None: the format's own, and none for a model that chats. samples:
    replies to each question. temperature: None: 0 for one sample, 0.6 for several (with top_p 0.95, as R1's report
    has it). max_tokens: of a reply; None: the format's own. limit: so many of the questions, chosen by chance.
    write: let the model write the answer to choices too. raw: continue text, also where the model was taught to chat.
    system: what a model that chats is told before the question.
    """

    shots: int | None = None
    samples: int = 1
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    limit: int | None = None
    seed: int = 0
    write: bool = False
    raw: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("shots", 0), ("samples", 1), ("max_tokens", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadInput(f"{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.samples > 1 and self.temperature == 0:
            raise BadInput(f"samples: at temperature 0 all {self.samples} would be the same: give a --temperature")
        if not 0 <= self.seed < 2**31:
            raise BadInput(f"seed must be between 0 and 2147483647, got {self.seed}")


@dataclass(frozen=True)
class Asking:
    """Everything that the questions of one task have in common."""

    llm: LLM
    task: Task
    pool: Sequence[Item] | None  # where solved examples come from; None: the task itself
    settings: Settings
    chat: bool

    @property
    def shots(self) -> int:
        standard = 0 if self.chat else self.task.format.shots
        return standard if self.settings.shots is None else self.settings.shots

    def prompt(self, number: int) -> list[int]:
        """What the model reads before it answers a question."""
        item, tokenizer = self.task.items[number], self.llm.tokenizer
        examples = examples_for(number, self.task.items, self.pool, self.shots)
        if self.chat:
            told = [] if self.settings.system is None else [{"role": "system", "content": self.settings.system}]
            return tokenizer.encode_chat(told + as_chat(item, examples))
        return [tokenizer.bos_id, *tokenizer.encode(as_text(item, examples))]

    def by_likelihood(self, number: int) -> bool:
        item = self.task.items[number]
        if not item.continuations or self.settings.write or self.settings.samples > 1:
            return False
        return len(item.continuations) == 1 or len(_key(item)) == 1

    def sampling(self, number: int, sample: int) -> Sampling:
        s, one = self.settings, self.settings.samples == 1
        return Sampling(
            temperature=s.temperature if s.temperature is not None else 0.0 if one else 0.6,
            top_p=s.top_p if s.top_p is not None else 1.0 if one else 0.95,
            max_tokens=s.max_tokens or self.task.format.max_tokens,
            stop=() if self.chat else self.task.format.stop,
            seed=((s.seed << 31) + number << 10) + sample,  # a reply depends on these alone
        )


def ask(
    llm: LLM,
    task: Task,
    settings: Settings,
    folder: Path,
    weights: str,
    chat: bool = False,
    pool: Sequence[Item] | None = None,
) -> dict[str, Any]:
    """Score of a task, and the counts of all that stood in its way. Questions answered before are not asked again.

    folder: where the records are kept. weights: a fingerprint of the model's. Raises BadInput where a task needs what
    is not installed.
    """
    asking = Asking(llm, task, pool, settings, chat and not settings.raw)
    numbers = chosen(len(task.items), settings.limit, settings.seed)
    examples = None if pool is None else [asdict(item) for item in pool[: 1 << 16]]
    questions = [asdict(item) for item in task.items]
    key = {"weights": weights, "questions": questions, "examples": examples, "settings": asdict(settings)}
    records = Records(folder, task.name, key | {"shots": asking.shots, "chat": asking.chat})
    began, before = time.perf_counter(), asdict(llm.engine.metrics)
    left = [number for number in numbers if number not in records.known]
    prompts = {number: asking.prompt(number) for number in left}
    by_likelihood = [number for number in left if asking.by_likelihood(number)]
    for first in range(0, len(by_likelihood), AT_ONCE):
        _compare(asking, by_likelihood[first : first + AT_ONCE], prompts, records)
    writing = [number for number in left if not asking.by_likelihood(number)]
    behind = _write(asking, writing, prompts, records)
    drafted = llm.engine.metrics.drafted - before["drafted"]
    accepted = llm.engine.metrics.accepted - before["accepted"]
    result = summary(task, [records.known[number] for number in numbers], settings.samples)
    result |= behind | {"shots": asking.shots, "asked": len(left), "seconds": round(time.perf_counter() - began, 3)}
    return result | ({"drafts_accepted": accepted / drafted} if drafted else {}) | {"records": str(records.path)}


# ── by likelihood ─────────────────────────────────────────────────────────────────────────────────────────────────


def spans(prompt: list[int], wholes: Sequence[list[int]]) -> list[Asked]:
    """Cuts texts, each the prompt and a choice, where choices begin to differ from the prompt as it is encoded alone.

    A token may reach over the prompt's end; then all choices are scored from before that token on, and stay comparable.
    """
    begins = min(len(prompt), *(len(whole) - 1 for whole in wholes))
    for whole in wholes:
        begins = next((i for i in range(begins) if whole[i] != prompt[i]), begins)
    return [Asked(tuple(whole[:begins]), tuple(whole[begins:])) for whole in wholes]


def _asked(asking: Asking, number: int, prompt: list[int]) -> list[Asked]:
    item, tokenizer = asking.task.items[number], asking.llm.tokenizer
    if asking.chat:
        return [Asked(tuple(prompt), tuple(tokenizer.encode(text.strip()))) for text in item.continuations]
    text = as_text(item, examples_for(number, asking.task.items, asking.pool, asking.shots))
    wholes = tokenizer.encode_batch([text + continuation for continuation in item.continuations])
    return spans(prompt, [[tokenizer.bos_id, *whole] for whole in wholes])


def _key(item: Item) -> frozenset[int]:
    return key_of(item.row["answer"], item.row["choices"]) or frozenset()


def _compare(asking: Asking, numbers: list[int], prompts: dict[int, list[int]], records: Records) -> None:
    """Records which continuation of each question surprises the model least."""
    context = asking.llm.config.max_position_embeddings
    asked = {number: _asked(asking, number, prompts[number]) for number in numbers}
    fits = [number for number in numbers if all(len(one.read) <= context for one in asked[number])]
    found = iter(likelihoods(asking.llm.model, [one for number in fits for one in asked[number]]))
    for number in numbers:
        if number not in fits:
            records.add(number, {"right": [0], "too_long": True})
            continue
        item = asking.task.items[number]
        likely = [next(found) for _ in item.continuations]
        row: dict[str, Any] = {"logprobs": [round(one.logprob, 6) for one in likely]}
        if len(likely) == 1:
            records.add(number, {"right": [int(likely[0].greedy)]} | row)
            continue
        (key,) = _key(item)
        tokens = [len(one.continuation) for one in asked[number]]
        sizes = [len(text.strip().encode()) for text in item.continuations]
        # The lowest perplexity, as in the report: summed up, the shortest choice would win whatever it says.
        answer = _likeliest(likely, tokens)
        row |= {"answer": answer, "key": key, "chance": 1 / len(likely)}
        row |= {"right_summed": int(_likeliest(likely, [1] * len(likely)) == key)}
        row |= {"right_per_byte": int(_likeliest(likely, sizes) == key)}
        records.add(number, {"right": [int(answer == key)]} | row)


def _likeliest(likely: Sequence[Likelihood], over: Sequence[int]) -> int:
    """The choice with the largest ln p over so much of it; the first of equals."""
    return max(range(len(likely)), key=lambda i: likely[i].logprob / over[i])


# ── by what it writes ─────────────────────────────────────────────────────────────────────────────────────────────


def _write(asking: Asking, numbers: list[int], prompts: dict[int, list[int]], records: Records) -> dict[str, Any]:
    """Records what the model writes in reply to each question, and whether that is right; what code was run behind."""
    engine, context = asking.llm.engine, asking.llm.config.max_position_embeddings
    waiting = iter(numbers)
    under_way: dict[int, list[Request]] = {}

    def begin() -> Iterator[int]:
        for number in waiting:
            if len(prompts[number]) > context:
                records.add(number, {"right": [0] * asking.settings.samples, "too_long": True})
                continue
            samples = range(asking.settings.samples)
            under_way[number] = [engine.submit(prompts[number], asking.sampling(number, i)) for i in samples]
            yield number

    runs_code = any(asking.task.items[number].row["verify"] == "code" for number in numbers)
    beginning = begin()
    bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
    with Verifier() as verifier, bar:
        asked = bar.add_task(asking.task.name, total=len(numbers))
        # Found before anything is asked: where there are no walls nothing shall be asked in vain.
        isolation = verifier.sandbox.isolation if runs_code else None
        try:
            more = True
            while more or under_way:
                while more and sum(map(len, under_way.values())) < AT_ONCE:
                    more = next(beginning, None) is not None
                engine.step()
                done = [n for n, requests in under_way.items() if all(r.finish_reason for r in requests)]
                for number in done:
                    _judge(asking, number, under_way.pop(number), verifier, records)
                    bar.advance(asked)
        finally:
            for requests in under_way.values():
                for request in requests:
                    engine.cancel(request)
    return {"isolation": isolation} if isolation else {}


def _judge(asking: Asking, number: int, requests: list[Request], verifier: Verifier, records: Records) -> None:
    replies = [request.read() for request in requests]
    verdicts = [verifier(reply, asking.task.items[number].row) for reply in replies]
    row: dict[str, Any] = {
        "right": [int(verdict.right) for verdict in verdicts],
        "answers": [verdict.answer for verdict in verdicts],
        "replies": replies,
        "ended": [int(request.finish_reason == "stop") for request in requests],
    }
    if hung := sum(verdict.hung for verdict in verdicts):
        row["hung"] = hung
    records.add(number, row)


# ── the score ─────────────────────────────────────────────────────────────────────────────────────────────────────


def summary(task: Task, rows: Sequence[dict[str, Any]], samples: int) -> dict[str, Any]:
    """score: the mean over all questions asked, those that could not be answered among them."""
    scores = [fmean(row["right"]) for row in rows]
    stderr, low, high = interval(scores)
    result: dict[str, Any] = {"score": fmean(scores), "stderr": stderr, "low": low, "high": high, "n": len(rows)}
    compared = [row for row in rows if "right_per_byte" in row]
    if compared:
        for how in ("per_byte", "summed"):
            result[f"score_{how}"] = sum(row[f"right_{how}"] for row in compared) / len(rows)
        result["chance"] = fmean(row["chance"] for row in compared)
    if samples > 1:
        k = 1
        while k <= samples:
            result[f"pass@{k}"] = fmean(pass_at_k(samples, sum(row["right"]), k) for row in rows)
            k *= 2
        voted = [majority(row.get("answers", [])) for row in rows]
        votes = [0 if place is None else row["right"][place] for place, row in zip(voted, rows, strict=True)]
        result[f"majority@{samples}"] = fmean(votes)
    counts = {
        "left_out": len(task.left_out),
        "too_long": sum("too_long" in row for row in rows),
        "hung": sum(row.get("hung", 0) for row in rows),
        "cut": sum(row.get("ended", []).count(0) for row in rows),
    }
    return result | counts


def warnings(task: Task, result: dict[str, Any], context: int) -> Iterator[str]:
    """What a reader of the score must know."""
    if task.left_out:
        yield f"{task.name}: left out {len(task.left_out)} rows; the first, {task.left_out[0]}"
    if result["too_long"]:
        yield (
            f"{task.name}: {result['too_long']} of {result['n']} questions are longer than the context of {context} "
            "tokens and count as not answered; fewer --shots make them shorter"
        )
    if result["hung"]:
        yield f"{task.name}: {result['hung']} replies could not be verified in time and count as wrong"


def tell(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
