"""Training in FP8 (report §3.3.1): which parts of a model compute in it, and how often weights are quantised.

Embedding, output head, gates, norms and the core of attention stay as they are, by the report's list; `eh_proj` of an
MTP module too, of which the report says nothing and which released weights hold in BF16.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from leanseek.model.block import Block
from leanseek.model.layers import Linear
from leanseek.model.mla import MLA
from leanseek.model.moe import Experts, LocalDispatcher
from leanseek.model.transformer import Transformer
from leanseek.ops.fp8_linear import AfterAttention, Fp8


def in_fp8(model: Transformer) -> None:
    """Has every matrix of the blocks, gates apart, multiply in FP8, by the model's kernels.

    The weights stay as they are: FP32 masters.
    """
    scale_format = model.config.verbatim.get("quantization_config", {}).get("scale_fmt")
    how = scale_format == "ue8m0", model.kernels
    precision, after_attention = Fp8(*how), AfterAttention(*how)
    modules = [module for block in model.modules() if isinstance(block, Block) for module in block.modules()]
    for module in modules:
        if isinstance(module, (Linear, Experts)):
            module.precision = precision
        if isinstance(module, Experts) and isinstance(module.dispatcher, LocalDispatcher):
            module.dispatcher.may_pad = False  # rows of padding would have a say in scales
    for module in modules:
        if isinstance(module, MLA):
            module.o_proj.precision = after_attention


@contextmanager
def weights_quantised_once(model: nn.Module) -> Iterator[None]:
    """Within, FP8 layers keep the codes of their weights, which must not change: for the micro-batches of a step."""
    precisions = {module.precision for module in model.modules() if isinstance(module, (Linear, Experts))}
    with ExitStack() as stack:
        for precision in precisions:
            if isinstance(precision, Fp8):
                stack.enter_context(precision.weights_kept())
        yield
