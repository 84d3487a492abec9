"""Learning from a larger model: its likeliest tokens at every place, beside the text's own next one.

What V3 takes from R1 it takes as text (report §5.4.1, `post/distill.py`); where teacher and student share a tokenizer,
the probabilities say more: of each place not one token but `top_k` of them with their weights.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from leanseek import checkpoint
from leanseek.config import BadInput, Config, TeacherConfig
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import likeliest
from leanseek.plan.count import forward_flops_per_token


@dataclass(frozen=True)
class Teacher:
    model: Transformer
    tokens: int  # ids that the tokenizer has; the rows of the head behind them mean nothing
    config: TeacherConfig

    @torch.no_grad()
    def likeliest(
        self, ids: Tensor, positions: Tensor, segments: Tensor | None, asked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The top-k tokens and their log-probabilities, [N, K] each, at the N places [b, T] where `asked` is true."""
        assert self.model.lm_head is not None
        hidden = self.model(ids, positions, segments)[asked]
        return likeliest(hidden, self.model.lm_head.weight[: self.tokens], min(self.config.top_k, self.tokens))

    def flops_per_token(self, length: int) -> float:
        """A forward pass of it, without MTP."""
        return forward_flops_per_token(self.model.config, length, mtp=False)


def teacher_of(config: Config, tokenizer: Tokenizer) -> Teacher | None:
    """The teacher that a configuration names, on the student's device; None where it names none. Raises BadInput."""
    if config.teacher is None:
        return None
    run, its = Path(config.teacher.run), check_teacher(config, tokenizer)
    assert its is not None
    model = Transformer(its.model, torch.bfloat16 if config.train.dtype in ("bf16", "fp8") else torch.float32)
    checkpoint.load_newest(run, model)
    return Teacher(model.requires_grad_(False).eval().to(config.train.device), tokenizer.vocab_size, config.teacher)


def check_teacher(config: Config, tokenizer: Tokenizer, processes: int = 1) -> Config | None:
    """The configuration of the teacher that a configuration names. Raises BadInput where it cannot teach this one."""
    if config.teacher is None:
        return None
    if processes > 1:
        raise BadInput(f"teacher.run: a teacher teaches one process, here are {processes}: start it without torchrun")
    run = Path(config.teacher.run)
    its = checkpoint.read_run(run)
    if Tokenizer.load(run / "tokenizer").fingerprint != tokenizer.fingerprint:
        raise BadInput(
            f"teacher {run}: has another tokenizer, so its tokens are not this run's: prepare the data with "
            f"--tokenizer {run / 'tokenizer'}, or learn from what it writes (leanseek distill)"
        )
    longest = max(stage.sequence_length for stage in config.stages)
    if longest > its.model.max_position_embeddings:
        raise BadInput(f"teacher {run}: reads {its.model.max_position_embeddings} tokens, a row here has {longest}")
    return its
