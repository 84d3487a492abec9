"""DeepSeek-V3 in readable PyTorch: from raw text to a model that talks.

Importing it costs nothing: each function imports its room.
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leanseek.model.transformer import Transformer
    from leanseek.serve.llm import LLM

__all__ = ["__version__", "load", "load_model"]
__version__ = "0.1.0"


def load(run: str | PathLike[str]) -> "LLM":
    """The model of a run folder, with its tokenizer, ready to `generate`, `stream` and `chat`. Raises BadInput."""
    from leanseek.serve.llm import LLM

    return LLM.load(Path(run))


def load_model(run: str | PathLike[str]) -> "Transformer":
    """The model of a run folder as a `torch.nn.Module`, weights as they are stored. Raises BadInput."""
    from leanseek.serve.llm import load_model

    return load_model(Path(run))
