"""The whole chain as one function to read: text, tokenizer, pre-training, instruction, exam, samples, the bill, a chat.

Nothing is downloaded: the text is the storyworld's, made here, or the user's own.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from leanseek import checkpoint, load
from leanseek.checkpoint import write_json
from leanseek.config import BadInput, Config, Stage, read_recipe
from leanseek.data.prepare import prepare
from leanseek.data.shards import Data, open_data
from leanseek.data.storyworld import CHATS, QUESTIONS, answer_is, chats, questions, story
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.harness import evaluate
from leanseek.post.sft import sft
from leanseek.serve.chat import chat
from leanseek.serve.llm import LLM
from leanseek.serve.sampling import Sampling
from leanseek.train.pretrain import assemble, pretrain
from leanseek.train.receipt import printed, summed
from leanseek.train.schedule import kinds_of_tokens, knobs
from leanseek.train.setup import settled
from leanseek.train.step import train_step

OF_STORIES, OF_TEXT = "demo", "nano"  # recipes: for the stories made here, and for anybody's text
STORY_BYTES, MOST_STORY_BYTES = 1_700_000, 60_000_000  # text made for each minute, and at most
HELD_OUT, VIGNETTES = 300_000, 2_000_000  # bytes of stories to validate on, and of vignettes to begin with
CHATS_PER_MINUTE, MOST_CHATS = 1_200, 60_000
RESERVE = 15.0  # seconds for the exam, the samples and the checkpoints
VALIDATING = 0.06  # share of the minutes that validation takes
INSTRUCTION = 0.35  # share of the training tokens
ALONE, FADING, FADES = 130_000, 100_000, (0.7, 0.5, 0.3, 0.15)  # tokens of vignettes alone, of each mixture, its share
SPEED_STEPS = 5  # of each kind, whose median speed says how many tokens fit
EXAM, AT_ONCE = 200, 50  # questions, and those answered side by side
SAMPLES, SHOWN, WORDS_GIVEN = 10, 3, 5


def demo(minutes: float, text: str | None, run: Path) -> None:
    """Runs the chain and shows it; the same call again takes up where it stopped. Raises BadInput."""
    if not 0 < minutes < math.inf:
        raise BadInput(f"--minutes must be a positive number, got {minutes}")
    run = run if run.name else run.absolute()
    data, base = run.with_name(f"{run.name}-data"), run.with_name(f"{run.name}-base")
    screen = Screen(minutes, stories=text is None)
    recipe = read_recipe(OF_STORIES if text is None else OF_TEXT)
    vocabulary = recipe.model.vocab_size

    screen.step("Text and tokenizer", f"raw text → clean documents → {vocabulary:,} tokens → shards")
    source = "" if text is None else str(Path(text).absolute()) if Path(text).exists() else text
    remembered = data / "demo-text"
    if not (data / "manifest.json").exists():
        size = round(min(STORY_BYTES * max(minutes, 0.5), MOST_STORY_BYTES))
        if text is None:
            inputs, held_out = (
                [f"storyworld:{size}", f"vignettes:{min(VIGNETTES, size // 4)}"],
                min(HELD_OUT, size // 4),
            )
            report = prepare(
                inputs, data, vocabulary, progress=sys.stderr.isatty(), validation=[f"storyworld:{held_out}"]
            )
        else:
            report = prepare([text], data, vocabulary, progress=sys.stderr.isatty())
        screen.show(report.lines())
        remembered.write_text(source, encoding="utf-8")
    elif remembered.exists() and remembered.read_text(encoding="utf-8") != source:
        raise BadInput(f"{run} was begun on other text: take another --out")
    opened = open_data(data)
    tokenizer = Tokenizer.load(opened.tokenizer_folder)

    screen.step("Pre-training", "reading: MLA, experts with loss-free balancing, multi-token prediction, Muon")
    first = base if text is None else run
    begun = (first / "config.toml").exists()
    of_chats = INSTRUCTION if text is None else 0.0
    config = checkpoint.read_run(first) if begun else budgeted(recipe, screen.left(), of_chats, opened, tokenizer)
    if text is None and not begun:
        config = config.model_copy(update={"stages": from_vignettes_to_stories(config)})
    receipts = [pretrain(config, data, first)]
    if not _complete(receipts[-1]):
        return

    if text is None:
        screen.step("Instruction", "chats: stories on request, questions about them; only the answers are learnt")
        file = run.with_name(f"{run.name}-chats.jsonl")
        if not file.exists():
            rows = min(round(CHATS_PER_MINUTE * max(minutes, 0.5)), MOST_CHATS)
            write_chats(file, rows)
            screen.show([f"{rows:,} conversations, {file.stat().st_size / 1e6:,.1f} MB"])
        tokens = round(config.train.tokens * INSTRUCTION / (1 - INSTRUCTION))
        receipts.append(sft(base, file, run, [f"train.tokens={tokens}"]))
        if not _complete(receipts[-1]):
            return

    llm = load(run)
    if text is None:
        screen.step("Exam", f"{EXAM} questions about stories it has never seen, each with its story before it")
        bpb = evaluate(base, ["bpb"])["bpb"]["bpb"]
        marks = list(exam(llm, EXAM))
        screen.exam(marks, bpb)
        screen.step("Samples", "unedited, at fixed seeds")
        told = list(stories_told(llm, SAMPLES))
        write_results(run, bpb, marks, told)
        for request, answer in told[:SHOWN]:
            screen.said(request, answer)
    else:
        screen.step("Samples", "unedited, at fixed seeds; the first words are those of documents it has not seen")
        for seed, prompt in enumerate(openings(opened, tokenizer)):
            completion = llm.generate(prompt, Sampling(temperature=0.7, max_tokens=80, seed=seed))
            screen.said(prompt, completion.text)

    screen.step("The bill", "what it took, and what the same FLOPs would cost where V3 was trained")
    screen.show(printed(summed(receipts)).splitlines())
    screen.what_next(run, [base / "loss.png", run / "loss.png"] if text is None else [run / "loss.png"])
    if sys.stdin.isatty():
        chat(run, None, Sampling(temperature=0.7))


# ── the parts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def budgeted(config: Config, seconds: float, chats: float, data: Data, tokenizer: Tokenizer) -> Config:
    """The recipe with the tokens that fit into the seconds on this machine, by a few steps' measure.

    So many of all tokens will be `chats`, and are left room for: from them MTP learns all along, and of whole rows.
    """
    config = config.model_copy(update={"train": settled(config.train)})
    like_chats = config.model_copy(update={"train": config.train.model_copy(update={"mtp_length": None})})
    late = sum(share for kind, share in kinds_of_tokens(config).items() if kind.mtp)
    kinds = [  # share of all tokens, place in the schedule, configuration
        ((1 - chats) * (1 - late), 0.5, config),
        ((1 - chats) * late, 0.99, config),
    ]
    if chats:
        kinds.append((chats, 0.99, like_chats))
    model, optimizers, loader, _ = assemble(config, data, tokenizer)
    budget, last = config.train.tokens, len(config.stages) - 1
    begun, of_a_step = time.perf_counter(), 0.0
    for share, at, like in kinds:
        now = replace(knobs(config.schedule, at * budget, budget), count_weight=0.0)  # nothing is counted yet
        rows, times = now.batch_tokens // config.stages[last].sequence_length, []
        for i in range(SPEED_STEPS):
            batch = loader.batch(last, i * rows, rows)
            ids, targets = (torch.from_numpy(array).to(config.train.device) for array in (batch.ids, batch.targets))
            start = time.perf_counter()
            train_step(model, optimizers, ids, targets, now, like)
            times.append(time.perf_counter() - start)
        of_a_step += share * median(times)
    steps = max(int((1 - chats) * (seconds - (time.perf_counter() - begun)) / of_a_step), 1)
    train = config.train.model_copy(update={"tokens": steps * ids.numel()})
    return config.model_copy(update={"train": train})


def from_vignettes_to_stories(config: Config) -> tuple[Stage, ...]:
    """Looking back is learnt first, on vignettes alone; then stories come in, more and more of them, to keep it alive.

    A few dozen steps after the warm-up are enough whatever the budget; a small budget gives a share of it.
    """
    tokens, whole = config.train.tokens, config.stages[0]
    warm_up = config.schedule.learning_rate[0].until
    alone, each = min(warm_up + ALONE / tokens, 0.06), min(FADING / tokens, 0.05)
    shares = [alone, *[each] * len(FADES), 1 - alone - len(FADES) * each]
    weights = [1.0, *FADES, 0.0]
    return tuple(
        whole.model_copy(update={"share": share, "mixture": {"vignettes": weight, "storyworld": 1 - weight}})
        for share, weight in zip(shares, weights, strict=True)
    )


def write_chats(file: Path, rows: int) -> None:
    """So many conversations of the storyworld as CHATS.jsonl, whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    every = (chat for number in count() for chat in chats(CHATS, number, min(rows, 5_000)))
    with partial.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in islice(every, rows))
    partial.replace(file)


@dataclass(frozen=True)
class Mark:
    question: str
    answer: str
    reply: str

    @property
    def right(self) -> bool:
        return answer_is(self.reply, self.answer)


def exam(llm: LLM, asked: int) -> Iterator[Mark]:
    """Single-fact questions about stories that are in the context and in no training text, answered greedily."""
    room = llm.config.max_position_embeddings - 24
    fitting = (
        row
        for number in count()
        for row in questions(QUESTIONS, number, 1_000)
        if len(llm.tokenizer.encode_chat([{"role": "user", "content": row["prompt"]}])) <= room
    )
    rows = list(islice(fitting, asked))
    for start in range(0, asked, AT_ONCE):
        some = rows[start : start + AT_ONCE]
        messages = [[{"role": "user", "content": row["prompt"]}] for row in some]
        replies = llm.chat_many(messages, Sampling(temperature=0, max_tokens=20))
        for row, reply in zip(some, replies, strict=True):
            yield Mark(row["prompt"].rpartition("\n")[2], row["answer"], reply.text)


def stories_told(llm: LLM, many: int) -> Iterator[tuple[str, str]]:
    """Requests for stories that nobody has told it, and what it tells."""
    for number in range(many):
        request = story(QUESTIONS, number).request
        sampling = Sampling(temperature=0.6, top_p=0.95, max_tokens=400, seed=number)
        yield request, llm.chat([{"role": "user", "content": request}], sampling).text


def write_results(run: Path, bpb: float, marks: list[Mark], told: list[tuple[str, str]]) -> None:
    """`exam.json`: the validation bpb before the chats, the accuracy, every answer, and the samples."""
    answers = [{"question": m.question, "answer": m.answer, "reply": m.reply, "right": m.right} for m in marks]
    accuracy = sum(mark.right for mark in marks) / len(marks)
    samples = [{"request": request, "reply": reply} for request, reply in told]
    write_json(run / "exam.json", {"bpb": bpb, "accuracy": accuracy, "samples": samples, "answers": answers})


def openings(data: Data, tokenizer: Tokenizer) -> list[str]:
    """The first words of a few documents it has not seen, to go on from."""
    first = [tokenizer.decode(ids[:50].tolist()) for ids, _ in islice(data.documents("validation"), SHOWN)]
    return [" ".join(text.split(" ")[:WORDS_GIVEN]) for text in first]


def _complete(receipt: dict[str, Any]) -> bool:
    if receipt["ended"] != "complete":
        print(f"stopped at step {receipt['steps']}; the same command goes on from there")
    return bool(receipt["ended"] == "complete")


# ── what a newcomer sees ──────────────────────────────────────────────────────────────────────────────────────────


class Screen:
    """What happens, how far, what it costs, what to try next."""

    def __init__(self, minutes: float, stories: bool) -> None:
        self.minutes, self.steps = minutes, 6 if stories else 4
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
        self.began, self.now = time.monotonic(), 0
        text = "stories that it makes up here" if stories else "your text"
        lines = [
            "From nothing to a model that " + ("chats" if stories else "writes"),
            f"[dim]A DeepSeek-V3 in small, trained on {text}, in about {minutes:g} minutes, on this machine.[/dim]",
            "[dim]Ctrl-C saves and stops; the same command goes on.[/dim]",
        ]
        self.console.print(Panel("\n".join(lines), title="[bold]LeanSeek[/bold]", border_style="cyan", padding=(1, 2)))

    def step(self, title: str, what: str) -> None:
        self.now += 1
        passed = time.monotonic() - self.began
        clock = f"{int(passed // 60)}:{int(passed % 60):02} of about {self.minutes:g}:00"
        self.console.print()
        self.console.rule(
            f"[bold cyan]{self.now}/{self.steps}  {title}[/bold cyan]  [dim]{clock}[/dim]", align="left", style="cyan"
        )
        self.console.print(f"[dim]{what}[/dim]")

    def left(self) -> float:
        """Seconds for training."""
        budget = 60 * self.minutes
        return max(budget * (1 - VALIDATING) - (time.monotonic() - self.began) - RESERVE, 0.3 * budget)

    def show(self, lines: list[str]) -> None:
        for line in lines:
            self.console.print(f"  {line.strip()}" if not line.startswith("  ") else line, markup=False)

    def exam(self, marks: list[Mark], bpb: float) -> None:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for head in ("", "question", "it says", "the story says"):
            table.add_column(head, overflow="fold")
        for mark in marks[:8]:
            sign = "[green]✓[/green]" if mark.right else "[red]✗[/red]"
            table.add_row(sign, escape(mark.question), escape(mark.reply.strip()), escape(mark.answer))
        self.console.print(table)
        right = sum(mark.right for mark in marks)
        full = round(40 * right / len(marks))
        self.console.print(
            f"\n  [bold]{right / len(marks):.0%}[/bold] right, {right} of {len(marks)}  "
            f"[green]{'━' * full}[/green][dim]{'━' * (40 - full)}[/dim]"
        )
        self.console.print(f"  {bpb:.4f} bits per byte on stories it has not read, before the chats")

    def said(self, asked: str, answer: str) -> None:
        self.console.print(f"\n[cyan]›[/cyan] [bold]{escape(asked)}[/bold]")
        self.console.print(escape(answer.strip()))

    def what_next(self, run: Path, plots: list[Path]) -> None:
        here = Path.cwd()
        short = [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in (run, *plots)]
        grid = Table.grid(padding=(0, 2))
        rows = [
            ("talk to it", f"leanseek chat {short[0]}"),
            ("one answer", f'leanseek generate {short[0]} --prompt "Tell me a story about a fox."'),
            ("longer, better", "leanseek demo --minutes 60 --out runs/hour"),
            ("your own text", "leanseek demo --text my-texts/ --out runs/mine"),
            ("the curves", ", ".join(short[1:])),
        ]
        for what, command in rows:
            grid.add_row(f"[dim]{what}[/dim]", f"[bold]{escape(command)}[/bold]")
        self.console.print(Panel(grid, title="try next", border_style="cyan", padding=(1, 2)))
