"""lm-evaluation-harness with our model class against its own `hf` model on the exported weights, item by item."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from leanseek.eval.lm_eval import LeanSeekLM, _sampling
from leanseek.hub import export_release
from leanseek.serve.llm import LLM
from tests.runs import CONTEXT, make_run, model_of, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and what it imports have many of their own

WORDS = ("fox", "wall", "rain", "over", "under", "old", "long", "small", "nothing", "slept")
CHOICE = """
task: foxes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "The {{{{question}}}} and the"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """
task: walls
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "The {{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["fox", "\\n"], do_sample: false, max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = tokenizer()
    model = model_of(vocabulary)
    with torch.no_grad():  # what our engine never draws, transformers shall not draw either: their logits are 0
        model.lm_head.weight[[vocabulary.bos_id, vocabulary.pad_id]] = 0
        model.lm_head.weight[vocabulary.vocab_size :] = 0
    return make_run(tmp_path_factory.mktemp("harness") / "run", model, vocabulary)


@pytest.fixture(scope="module")
def ours(run: Path) -> LeanSeekLM:
    return LeanSeekLM(run)


@pytest.fixture(scope="module")
def theirs(run: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    export_release(run, run.parent / "exported")
    return HFLM(
        pretrained=str(run.parent / "exported"), device="cpu", dtype="float32", batch_size=4, max_length=CONTEXT,
        add_bos_token=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tasks(run: Path) -> Any:
    from lm_eval.tasks import TaskManager

    dice = random.Random(0)
    rows = [
        {
            "question": " ".join(dice.choices(WORDS, k=4)),
            "choices": [" ".join(dice.choices(WORDS, k=k)) for k in (1, 1, 2, 3)],
            "answer": dice.randrange(4),
        }
        for _ in range(24)
    ]
    file = run.parent / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run.parent / "tasks"
    folder.mkdir()
    for name, text in (("foxes", CHOICE), ("walls", WRITE)):
        (folder / f"{name}.yaml").write_text(text.format(file=file))
    return TaskManager(include_path=str(folder), include_defaults=False)


def scores(model: Any, tasks: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    import lm_eval

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with torch.no_grad():
        return lm_eval.simple_evaluate(
            model, tasks=["foxes", "walls"], task_manager=tasks, log_samples=True, num_fewshot=0, bootstrap_iters=0,
            verbosity="ERROR",
        )  # fmt: skip


def test_two_tasks_are_scored_as_by_the_harness_itself(
    ours: LeanSeekLM, theirs: Any, tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, expected = (scores(model, tasks, monkeypatch) for model in (ours, theirs))
    for task in ("foxes", "walls"):
        a, b = found["samples"][task], expected["samples"][task]
        assert len(a) == len(b) == 24
        for one, other in zip(a, b, strict=True):
            assert one["doc"] == other["doc"]
            if task == "walls":
                assert one["resps"] == other["resps"]
                continue
            for (logprob,), (wanted,) in zip(one["resps"], other["resps"], strict=True):
                # Both in FP32: sums of a few logits of size ten; a span that is one off differs by whole nats.
                assert float(logprob[0]) == pytest.approx(float(wanted[0]), abs=2e-3)
                assert str(logprob[1]) == str(wanted[1])
            assert (one["acc"], one["acc_norm"]) == (other["acc"], other["acc_norm"])
        assert found["results"][task] == expected["results"][task]
    assert 0 < found["results"]["foxes"]["acc,none"] < 1
    assert len({str(sample["resps"]) for sample in found["samples"]["walls"]}) > 5


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def test_whole_texts_in_windows(ours: LeanSeekLM, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter than the context, and several times as long. With BOS added, the harness scores that too."""
    monkeypatch.setattr(theirs, "add_bos_token", False)
    dice = random.Random(1)
    texts = [Request(" ".join(dice.choices(WORDS, k=k))) for k in (3, 12, 90)]
    found, expected = ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert len(ours.tok_encode(texts[2].args[0])) > 2 * CONTEXT
    assert found == pytest.approx(expected, rel=1e-4)


def test_what_does_not_fit_is_cut_on_the_left(ours: LeanSeekLM, theirs: Any) -> None:
    pairs = [Request("The fox " * 40, " slept under the wall"), Request("", "The fox"), Request("The wall ", "was old")]
    found, expected = ours.loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [bool(greedy) for _, greedy in expected]


def test_a_span_one_off_is_seen(ours: LeanSeekLM, theirs: Any) -> None:
    ids = ours.tok_encode("The old fox slept under the long wall")
    cut = len(ids) - 3
    expected = theirs._loglikelihood_tokens([(("a", "b"), ids[:cut], ids[cut:])], disable_tqdm=True)[0][0]
    right = ours._loglikelihood_tokens([(("a", "b"), ids[:cut], ids[cut:])])[0][0]
    assert right == pytest.approx(expected, abs=2e-3)
    for off in (cut - 1, cut + 1):
        assert abs(ours._loglikelihood_tokens([(("a", "b"), ids[:off], ids[off:])])[0][0] - expected) > 0.1


def test_options_of_a_request() -> None:
    told = _sampling({"until": "\n", "max_gen_toks": 7, "do_sample": True, "temperature": 0.5, "top_p": 0.9})
    assert (told.stop, told.max_tokens, told.temperature, told.top_p) == (("\n",), 7, 0.5, 0.9)
    assert _sampling({"do_sample": False, "temperature": 0.5}).temperature == 0
    assert _sampling({"until": ["", "x"]}).stop == ("x",)


def test_a_loaded_model_serves_too(run: Path) -> None:
    assert LeanSeekLM(LLM.load(run)).max_length == CONTEXT
