"""The row formats of well-known benchmarks → questions, asked in the report's settings (§4.4, table 3).

A format is known by the fields of its rows. `shots` and the way of scoring are the report's where it has the benchmark:
MMLU and CMMLU compare the likelihood of the choices, with five examples; the others let the model write. The words
around the questions are ours, for the report does not print its own.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase as LETTERS
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """`row`: what a verifier needs. `cue`: what leads from the question to the answer, for a model that continues text.

    `continuations`: the choices as they would follow the cue; where there are any their likelihood decides. A single
    one is right when the model would have written it, token by token.
    """

    row: dict[str, Any]
    question: str
    solution: str  # as an example shows it behind the cue
    cue: str = ""
    header: str = ""
    group: str = ""
    continuations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """`stop`: where the answer of a model that continues text ends. max_tokens: of one answer."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Row], Item]
    shots: int = 0
    stop: tuple[str, ...] = ("\n\n",)
    max_tokens: int = 32

    def fits(self, row: Row) -> bool:
        return all(name in row for name in self.needs)


def _item(verify: str, question: str, answer: str, solution: str, cue: str, **more: Any) -> Item:
    beside = {name: more.pop(name) for name in ("choices", "numbers", "tests", "setup", "prefix") if name in more}
    row = {"prompt": question, "verify": verify, "answer": answer} | beside
    return Item(row, question, solution, cue, **more)


def _text(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} is no text")
    return value


def behind(prompt: str, text: str) -> str:
    """A text as it goes on behind a prompt: with a space between, unless one is there or the script has none."""
    wide = prompt[-1:] >= "\u2e80"
    return text if wide or prompt[-1:].isspace() else f" {text}"


# ── the project's own ─────────────────────────────────────────────────────────────────────────────────────────────


def _own(row: Row) -> Item:
    question = _text(row, "prompt")
    answer = row.get("answer")
    choices = row.get("choices") if row["verify"] == "choice" else None
    texts = [choice for choice in choices if isinstance(choice, str)] if isinstance(choices, list) else []
    continuations = tuple(behind(question, choice) for choice in texts)
    solution = row.get("solution", answer)
    if texts and isinstance(answer, str) and len(answer) == 1 and answer in LETTERS[: len(texts)]:
        solution = texts[LETTERS.index(answer)]
    return Item(dict(row), question, behind(question, str(solution)), continuations=continuations)


def _sum(row: Row) -> Item:
    question, answer = _text(row, "prompt"), str(row["answer"])
    return _item("exact", question, answer, behind(question, answer), "")


def _countdown(row: Row) -> Item:
    question, target = _text(row, "prompt"), str(row["target"])
    solved = str(row.get("example_solution", ""))
    return _item("countdown", question, target, f" {solved}", "\nAnswer:", numbers=row["numbers"])


# ── mathematics ───────────────────────────────────────────────────────────────────────────────────────────────────


def _gsm8k(row: Row) -> Item:
    worked, _, final = _text(row, "answer").rpartition("####")
    final = str(row.get("final", final)).strip()
    worked = re.sub(r"<<[^>]*>>", "", worked).strip()  # notes for a calculator
    solution = f" {worked}\n#### {final}" if worked else f" The answer is {final}."
    return _item("math", f"Question: {_text(row, 'question')}", final, solution, "\nAnswer:")


def _math(row: Row) -> Item:
    solution = f" {row['solution']}" if row.get("solution") else f" The answer is $\\boxed{{{row['answer']}}}$."
    return _item("math", f"Problem: {_text(row, 'problem')}", str(row["answer"]), solution, "\nAnswer:")


def _svamp(row: Row) -> Item:
    asked = f"Question: {_text(row, 'Body')} {_text(row, 'Question')}"
    answer = f"{float(row['Answer']):g}"
    return _item("math", asked, answer, f" The answer is {answer}.", "\nAnswer:")


# ── choices ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _listed(choices: list[str]) -> str:
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def _without_letters(options: list[str]) -> list[str]:
    """Options as some files have them, each with its letter before it: "(A)…", "A)…", "A.…"."""
    return [re.sub(r"^\s*[(（]?[A-Z][)）.．:]\s*", "", str(option)) for option in options]


def _mmlu(row: Row) -> Item:
    subject, choices = str(row["subject"]).replace("_", " "), [str(choice) for choice in row["choices"]]
    asked, key = _text(row, "question") + _listed(choices), str(row["answer"])
    if key.isdecimal():
        key = LETTERS[int(key)]
    chinese = any("\u4e00" <= letter <= "\u9fff" for letter in asked)
    header = (
        f"以下是关于{subject}的单项选择题，请选出正确答案。\n\n"
        if chinese
        else f"These are multiple choice questions about {subject}, each with its answer.\n\n"
    )
    cue = "\n答案：" if chinese else "\nAnswer:"
    letters = tuple(behind(cue, letter) for letter in LETTERS[: len(choices)])
    return _item(
        "choice", asked, key, behind(cue, key), cue,
        choices=_told_apart(choices), header=header, group=subject, continuations=letters,
    )  # fmt: skip


def _openbookqa(row: Row) -> Item:
    asked, key = _text(row, "Question Stem"), str(row["Answer Key"])
    parts = re.split(r"\(([A-Z])\)\s*", _text(row, "Choices"))
    if parts[1::2] != list(LETTERS[: len(parts) // 2]):
        raise ValueError("'Choices' are not (A) … (B) …")
    choices = [part.strip() for part in parts[2::2]]
    solution = f" {choices[LETTERS.index(key)]}" if key in parts[1::2] else ""
    continuations = tuple(f" {choice}" for choice in choices)
    return _item("choice", asked, key, solution, "", choices=choices, continuations=continuations)


def _agieval(row: Row) -> Item:
    passage = f"{row['passage']}\n" if row.get("passage") else ""
    asked, group = passage + str(row["question"]), str(row.get("task", ""))
    if not row["options"]:
        return _item("math", asked, str(row["answer"]), f" {row['answer']}", "\nAnswer:", group=group)
    choices = _told_apart(_without_letters(row["options"]))
    key = "".join(letter for letter in "".join(row["label"]) if letter.isalpha())  # "B", "A C" or ["A", "C"]
    return _item(
        "choice", asked + _listed(choices), key, f" {key}", "\nAnswer:", choices=choices, group=group
    )  # fmt: skip


def _aqua(row: Row) -> Item:
    choices = _told_apart(_without_letters(row["options"]))
    asked, key = f"Question: {_text(row, 'question')}{_listed(choices)}", _text(row, "correct")
    worked = f" {str(row['rationale']).strip()}\n" if row.get("rationale") else " "
    return _item("choice", asked, key, f"{worked}The answer is ({key}).", "\nAnswer:", choices=choices)


def _told_apart(choices: list[str]) -> list[str]:
    """Published files have questions with a choice twice; the letter alone tells those apart."""
    return [
        choice if choices.index(choice) == place else f"{choice} [{place + 1}]" for place, choice in enumerate(choices)
    ]


# ── language ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _bbh(row: Row) -> Item:
    answer = _text(row, "target")
    return _item("exact", f"Q: {_text(row, 'input')}", answer, f" {answer}", "\nA:", group=str(row["task"]))


def _lambada(row: Row) -> Item:
    before, _, last = _text(row, "text").strip().rpartition(" ")
    if not before:
        raise ValueError("'text' has one word")
    return _item("exact", before, last, f" {last}", "", continuations=(f" {last}",))


def _cluewsc(row: Row) -> Item:
    spans, label = row["target"], str(row["label"]).lower()
    if label not in ("true", "false"):
        raise ValueError("'label' is neither true nor false")
    asked = f"{_text(row, 'text')}\n问题：这里的“{spans['span2_text']}”指的是“{spans['span1_text']}”吗？"
    answer = "是" if label == "true" else "否"
    return _item("exact", asked, answer, answer, "\n回答（是或否）：")


# ── code ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _mbpp(row: Row) -> Item:
    tests = [str(test) for test in row["test_list"]]
    asked = f"{_text(row, 'text')} It must pass these tests:\n" + "\n".join(tests)
    code = str(row.get("code", "")).replace("\r\n", "\n").strip()
    return _item(
        "code", asked, "", code + "\n```", "\n```python\n", tests=tests, setup=str(row.get("test_setup_code") or "")
    )


def _humaneval(row: Row) -> Item:
    start = _text(row, "prompt")
    tests = [f"{_text(row, 'test')}\ncheck({_text(row, 'entry_point')})"]
    return _item("code", start, "", str(row.get("canonical_solution", "")), "", tests=tests, prefix=start)


FORMATS = (
    Format("task", ("prompt", "verify"), _own, stop=("\n\n",), max_tokens=256),
    Format(
        "humaneval", ("prompt", "test", "entry_point"), _humaneval, 0, ("\ndef ", "\nclass ", "\nif ", "\nprint("), 512
    ),
    Format("countdown", ("prompt", "numbers", "target"), _countdown, 0, ("\n",), 64),
    Format("sums", ("prompt", "answer"), _sum, 0, ("\n",), 16),
    Format("openbookqa", ("Question Stem", "Choices", "Answer Key"), _openbookqa),
    Format("mmlu", ("subject", "question", "choices", "answer"), _mmlu, 5),
    Format("agieval", ("question", "options", "label"), _agieval, 0, ("\n\n",), 256),
    Format("aqua", ("question", "options", "correct"), _aqua, 4, ("\nQuestion:",), 512),
    Format("gsm8k", ("question", "answer"), _gsm8k, 8, ("\nQuestion:",), 512),
    Format("math", ("problem", "answer"), _math, 4, ("\nProblem:",), 512),
    Format("svamp", ("Body", "Question", "Answer"), _svamp, 8, ("\nQuestion:", "\n\n"), 256),
    Format("mbpp", ("text", "test_list"), _mbpp, 3, ("```",), 512),
    Format("bbh", ("task", "input", "target"), _bbh, 3, ("\nQ:", "\n\n"), 256),
    Format("cluewsc", ("text", "target", "label"), _cluewsc, 5, ("\n",), 8),
    Format("lambada", ("text",), _lambada),
)
