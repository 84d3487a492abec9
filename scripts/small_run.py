"""Trains, once, the small model that other tools are asked to run, in the folder named; prints where the run is.

It is nano with the latent and rotary widths of the releases, the only ones that vLLM's CPU kernels know, on the
project's own stories.
"""

import contextlib
import sys
from pathlib import Path

from leanseek.config import read_recipe
from leanseek.data.prepare import prepare
from leanseek.train.pretrain import pretrain

SHAPES = ("model.kv_lora_rank=512", "model.qk_rope_head_dim=64", "model.vocab_size=1024")
TRAINING = ("train.dtype=fp32", "train.device=cpu", "train.tokens=300000")

work = Path(sys.argv[1])
with contextlib.redirect_stdout(sys.stderr):
    if not (work / "data").exists():
        prepare(["storyworld:2000000"], work / "data", vocab_size=1024, workers=1)
    pretrain(read_recipe("nano", [*SHAPES, *TRAINING]), work / "data", work / "run")
print(work / "run")
