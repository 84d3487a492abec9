"""datatrove runs the same cleaning as the process pool: the same documents, in the same tokens."""

import json
import random
from pathlib import Path

import pytest

from leanseek.data.filters import Filters
from leanseek.data.prepare import Cleaning, prepare
from leanseek.data.shards import SPLITS, open_data
from leanseek.data.storyworld import MADE, PRETRAINING

datatrove = pytest.importorskip("datatrove")


def test_datatrove_keeps_the_documents_that_prepare_keeps(tmp_path: Path) -> None:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    from leanseek.data.cluster import Clean, Keep, Match, Shard, Sign, collect

    texts = list(MADE["storyworld"](PRETRAINING, 11, 400_000))
    rng = random.Random(0)
    copies = [rng.choice(texts) for _ in range(30)] + [rng.choice(texts).replace("the", "a", 1) for _ in range(30)]
    lists = rng.sample(
        texts + copies + ["la " * 100] * 5 + ["write to a@mail.example.org " + text for text in texts[:4]],
        k=len(texts) + 69,
    )
    raw = tmp_path / "raw"
    raw.mkdir()
    for i, part in enumerate((lists[: len(lists) // 3], lists[len(lists) // 3 :])):
        (raw / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    asked = Cleaning(quality=["all"], personal=True)
    here = prepare([f"web={raw}"], tmp_path / "here", vocab_size=600, workers=1, cleaning=asked)
    tokenizer = tmp_path / "here" / "tokenizer"

    filters = Filters(quality=frozenset({""}), personal=True)
    work, logs = tmp_path / "work", tmp_path / "logs"
    pipelines = [
        ([JsonlReader(str(raw)), Clean("web", filters), Sign(work / "marks"),
          JsonlWriter(str(work / "clean"), output_filename="${rank}.jsonl", compression=None)], 2),
        ([Match(work / "marks")], 1),
        ([JsonlReader(str(work / "clean")), Keep(work / "marks"), Shard(tmp_path / "there", tokenizer)], 2),
    ]  # fmt: skip
    for number, (steps, tasks) in enumerate(pipelines):
        LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(logs / str(number))).run()
    collect(tmp_path / "there", tokenizer)

    assert here.exact_duplicates >= 30
    assert here.near_duplicates >= 20
    a, b = open_data(tmp_path / "here"), open_data(tmp_path / "there")
    for split in SPLITS:
        ours, theirs = list(a.documents(split)), list(b.documents(split))
        assert [(ids.tolist(), size) for ids, size in ours] == [(ids.tolist(), size) for ids, size in theirs]
    assert sum(b.report["documents"].values()) == sum(here.documents.values())
