"""The whole chain as one function to read: text, tokenizer, shards, training, evaluation, samples, the bill, a chat."""

import math
import sys
import time
from itertools import islice
from pathlib import Path

import torch

from leanseek import checkpoint, load
from leanseek.config import BadInput, Config, read_recipe
from leanseek.data.at_hand import text_at_hand
from leanseek.data.prepare import prepare
from leanseek.data.shards import Data, open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.harness import evaluate
from leanseek.serve.chat import chat
from leanseek.serve.sampling import Sampling
from leanseek.train.pretrain import assemble, pretrain, settled
from leanseek.train.receipt import printed
from leanseek.train.schedule import knobs
from leanseek.train.step import train_step

SAMPLES, WORDS_GIVEN = 3, 5
TRAINING_SHARE = 0.8  # of the minutes; the rest is validation, checkpoints and samples


def demo(minutes: float, text: str | None, run: Path) -> None:
    """Runs the chain and prints what happens; the same call again takes up where it stopped. Raises BadInput."""
    if not 0 < minutes < math.inf:
        raise BadInput(f"--minutes must be a positive number, got {minutes}")
    run = run.absolute()
    data = run.with_name(run.name + "-data")
    source = "" if text is None else str(Path(text).absolute()) if Path(text).exists() else text
    remembered = data / "demo-text"
    if not (data / "manifest.json").exists():
        _say("1  text → tokenizer → shards")
        inputs = [text] if text is not None else text_at_hand(run.with_name(run.name + "-text"))
        for line in prepare(inputs, data, progress=sys.stderr.isatty()).lines():
            print(f"   {line}")
        remembered.write_text(source, encoding="utf-8")
    elif remembered.exists() and remembered.read_text(encoding="utf-8") != source:
        raise BadInput(f"{run} was begun on other text: take another --out")

    _say("2  training: MLA, mixture of experts with loss-free balancing, multi-token prediction")
    opened = open_data(data)
    tokenizer = Tokenizer.load(opened.tokenizer_folder)
    begun = (run / "config.toml").exists()
    config = checkpoint.read_run(run) if begun else budgeted(minutes, opened, tokenizer)
    receipt = pretrain(config, data, run)
    if receipt["ended"] != "complete":
        print(f"stopped at step {receipt['steps']}; the same command goes on from there")
        return

    _say("3  evaluation")
    result = evaluate(run, ["bpb"])["bpb"]
    print(f"   {result['bpb']:.4f} bits per byte on {result['bytes']:,} bytes it has not seen")

    _say("4  samples, unedited")
    llm = load(run)
    for seed, prompt in enumerate(openings(opened, tokenizer)):
        completion = llm.generate(prompt, Sampling(temperature=0.7, max_tokens=80, seed=seed))
        print(f"{prompt}{completion.text}\n   …{completion.tokens_per_second:,.0f} tokens/s\n")

    _say("5  the bill")
    print(printed(receipt))
    print(f"\n  curves           {run / 'loss.png'}\n  talk to it       leanseek chat {run}")
    if sys.stdin.isatty():
        chat(run, None, Sampling(temperature=0.7))


def budgeted(minutes: float, data: Data, tokenizer: Tokenizer) -> Config:
    """The nano recipe with the tokens that this machine can train in the given minutes, by three steps' measure."""
    config = read_recipe("nano")
    config = config.model_copy(update={"train": settled(config.train)})
    model, optimizers, loader = assemble(config, data, tokenizer)
    now = knobs(config.schedule, 0, config.train.tokens)
    batch = loader.batch(0, 0, now.batch_tokens // config.stages[0].sequence_length)
    ids, targets = (torch.from_numpy(array).to(config.train.device) for array in (batch.ids, batch.targets))
    seconds = []
    for _ in range(3):  # the first one also warms up
        begun = time.perf_counter()
        train_step(model, optimizers, ids, targets, now, config)
        seconds.append(time.perf_counter() - begun)
    steps = max(round(TRAINING_SHARE * 60 * minutes / min(seconds)), 1)
    train = config.train.model_copy(update={"tokens": steps * ids.numel()})
    return config.model_copy(update={"train": train})


def openings(data: Data, tokenizer: Tokenizer) -> list[str]:
    """The first words of a few documents it has not seen, to go on from."""
    first = [tokenizer.decode(ids[:50].tolist()) for ids, _ in islice(data.documents("validation"), SAMPLES)]
    return [" ".join(text.split(" ")[:WORDS_GIVEN]) for text in first]


def _say(title: str) -> None:
    print(f"\n── {title}", flush=True)
