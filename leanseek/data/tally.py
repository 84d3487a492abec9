"""What `prepare` did, in numbers: step by step, with samples of what was dropped."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

SAMPLES = 5  # of each reason
SAMPLE_CHARACTERS = 300


@dataclass
class Step:
    """What one step was given and what it let through; bytes are those of the texts."""

    name: str
    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # why documents were dropped

    def count(self, size: int, dropped: str | None = None, documents: int = 1) -> None:
        """So many documents of `size` bytes together came through, or were dropped for a reason."""
        self.documents_in += documents
        self.bytes_in += size
        if dropped is None:
            self.documents_out += documents
            self.bytes_out += size
        else:
            self.reasons[dropped] = self.reasons.get(dropped, 0) + documents


@dataclass
class Report:
    """`bad` and `first_bad` are by kind of record: how many, and where the first one is."""

    bytes_in: int = 0  # of the inputs, unpacked
    documents_in: int = 0  # records that hold a text
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: dict[str, str] = field(default_factory=dict)
    replaced_bytes: int = 0
    steps: list[Step] = field(default_factory=list)  # those that were asked for and may drop a document, in order
    dropped: list[dict[str, str]] = field(default_factory=list)  # samples: step, reason, where, text
    masked: dict[str, int] = field(default_factory=dict)  # by kind of personal data
    judge_accuracy: float | None = None  # of the quality classifier, on examples it did not learn from
    exact_duplicates: int = 0
    near_duplicates: int = 0
    leaked: int = 0  # of the exact duplicates, training documents that stand in the given validation text
    documents: dict[str, int] = field(default_factory=dict)  # kept, by split; so are the two below
    bytes: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    vocab_size: int = 0
    bytes_per_token: float = 0.0
    bytes_per_token_by_source: dict[str, float] = field(default_factory=dict)
    tokenizer_sample_bytes: int = 0  # 0: the tokenizer was given
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, as are those of all processors together
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    def step(self, name: str) -> Step:
        """The step of this name, a new one where there was none."""
        found = next((step for step in self.steps if step.name == name), None)
        if found is None:
            self.steps.append(found := Step(name))
        return found

    def sample(self, step: str, reason: str, where: str, text: str) -> None:
        """Keeps what was dropped, if there are few of its kind yet."""
        if sum(one["step"] == step and one["reason"] == reason for one in self.dropped) < SAMPLES:
            self.dropped.append({"step": step, "reason": reason, "where": where, "text": text[:SAMPLE_CHARACTERS]})

    def lines(self) -> list[str]:
        """For people: a few plain lines."""
        out = [f"read {self.documents_in:,} documents, {self.bytes_in / 1e6:,.1f} MB"]
        out += [f"left out {n:,} records: {kind}; the first is {self.first_bad[kind]}" for kind, n in self.bad.items()]
        if self.replaced_bytes:
            out.append(f"replaced {self.replaced_bytes:,} bytes that are no UTF-8")
        for step in self.steps:
            if step.name.endswith("duplicates"):
                continue  # said below
            gone, size = step.documents_in - step.documents_out, step.bytes_in - step.bytes_out
            most = sorted(step.reasons.items(), key=lambda item: -item[1])
            why = "; ".join(f"{reason} {n:,}" for reason, n in most[:3]) + ("; …" if len(most) > 3 else "")
            out.append(
                f"{step.name}: {step.documents_in:,} documents, {step.bytes_in / 1e6:,.1f} MB in; "
                f"dropped {gone:,}, {size / 1e6:,.1f} MB"
                + (f" ({why})" if why and why != f"{step.name} {gone:,}" else "")
            )
        if self.masked:
            out.append("masked " + ", ".join(f"{n:,} × {kind}" for kind, n in self.masked.items()))
        if self.judge_accuracy is not None:
            out.append(f"the judge of quality tells {self.judge_accuracy:.1%} of held-out examples right")
        leaked = f", {self.leaked:,} of them copies of validation text" if self.leaked else ""
        out.append(f"removed {self.exact_duplicates:,} exact{leaked} and {self.near_duplicates:,} near duplicates")
        if self.tokenizer_sample_bytes:
            out.append(f"learnt the tokenizer from {self.tokenizer_sample_bytes / 1e6:,.1f} MB of the training text")
        for split, documents in self.documents.items():
            out.append(f"{split}: {documents:,} documents, {self.tokens[split]:,} tokens")
        apart = self.bytes_per_token_by_source
        by_source = f" ({', '.join(f'{name} {rate:.2f}' for name, rate in apart.items())})" if len(apart) > 1 else ""
        out.append(f"{self.vocab_size:,} ids, {self.bytes_per_token:.2f} bytes per token{by_source}")
        return [*out, f"{sum(self.seconds.values()):.1f} s"]

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        """What `asdict` made of one."""
        return cls(**(state | {"steps": [Step(**step) for step in state["steps"]]}))

    def state(self) -> dict[str, Any]:
        return asdict(self)
