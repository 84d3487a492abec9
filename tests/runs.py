"""A RUN folder made by hand: a tiny model with weights of unit scale, and a tokenizer learnt from a few sentences."""

from pathlib import Path

from leanseek.checkpoint import create_run, save
from leanseek.config import Config, Stage, read_recipe
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.transformer import Transformer
from tests.oracle import fill, tiny
from tests.tiny import PLAIN

TEXT = (
    "A small fox walked over the long wall and said nothing. Nobody saw the fox; the wall was old.\n"
    "Later the rain came, and the fox slept under the wall until the rain was over.\n"
)
CONTEXT = 48
SPARE_ROWS = 13  # rows of the embedding that no token has


def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 340)


def model_of(vocabulary: Tokenizer, **changes: object) -> Transformer:
    """A tiny model, in training mode as after training, whose logits are far from flat."""
    shape = {"vocab_size": vocabulary.vocab_size + SPARE_ROWS, "max_position_embeddings": CONTEXT}
    ends = {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id}
    model = Transformer(tiny(**(shape | ends | changes)))
    fill(model)
    return model


def config_of(model: Transformer, sequence_length: int = 16) -> Config:
    base = read_recipe(str(PLAIN), ["train.dtype=fp32", "train.device=cpu"])
    stages = (Stage(sequence_length=sequence_length),)
    return base.model_copy(update={"model": model.config, "stages": stages})


def make_run(run: Path, model: Transformer, vocabulary: Tokenizer, fingerprint: str = "", data: str = "gone") -> Path:
    """RUN as pretrain leaves it, at step 7."""
    vocabulary.save(run.parent / "vocabulary")
    create_run(run, config_of(model), fingerprint, run.parent / "vocabulary", run.parent / data)
    save(run, 7, model, [], {}, keep=1)
    return run
