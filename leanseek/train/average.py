"""An exponential moving average of the weights, in CPU memory (report §3.2.3).

It tells early how good a model will be once its learning rate has decayed; training never looks at it.
"""

import torch
from torch import Tensor, nn

from leanseek.parallel.parts import local


class Average:
    """`weights` by name, of a model or a rank's part of it: parameters averaged in at least FP32, buffers as they are.

    After each step average ← decay · average + (1 − decay) · weights; it begins with the weights it is made from.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            value = local(tensor)
            self.weights[name] = value.detach().to("cpu", torch.promote_types(value.dtype, torch.float32), copy=True)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After an optimizer step."""
        averaged = dict(model.named_parameters())
        for name, tensor in model.state_dict().items():
            average, value = self.weights[name], local(tensor).cpu()
            if name in averaged:
                average.lerp_(value.to(average.dtype), 1 - self.decay)
            else:
                average.copy_(value)
