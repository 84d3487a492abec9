"""DeepSeek-V3 in readable PyTorch: from raw text to a model that talks.

Importing it costs nothing: each function imports its room.
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leanseek.model.transformer import Transformer
    from leanseek.parallel.mesh import Ranks
    from leanseek.serve.llm import LLM

__all__ = ["__version__", "load", "load_model"]
__version__ = "0.1.0"


def load(run: str | PathLike[str], ranks: "Ranks | None" = None) -> "LLM":
    """The model of a run folder, with its tokenizer, ready to `generate`, `stream` and `chat`. Raises BadInput.

    `ranks` are the processes that the model is cut over, `parallel.mesh.serving_ranks`; all must be asked the same.
    """
    from leanseek.parallel.mesh import ALONE
    from leanseek.serve.llm import LLM

    return LLM.load(Path(run), ranks=ranks or ALONE)


def load_model(run: str | PathLike[str], ranks: "Ranks | None" = None) -> "Transformer":
    """The model of a run folder as a `torch.nn.Module`, weights as they are stored. Raises BadInput.

    With `ranks`, this process's share of it.
    """
    from leanseek.parallel.mesh import ALONE
    from leanseek.serve.llm import load_model

    return load_model(Path(run), ranks=ranks or ALONE)
