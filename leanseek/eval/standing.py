"""What reports show beside quality: how evenly experts are used, and how often MTP drafts are right."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanseek.eval.bpb import Window, batches
from leanseek.model.moe import Router, max_violation
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE

TOKENS = 1 << 14  # that are looked at; a share of 0.5 is then good to half a percent


@dataclass(frozen=True)
class Standing:
    """`max_violation` of the worst layer of the main model (report §4.5.2); None without experts.

    `drafts_accepted`: how often the first MTP module's likeliest token is the model's own (§5.4.3); None without one.
    """

    max_violation: float | None
    drafts_accepted: float | None


@torch.no_grad()
def standing(model: Transformer, windows: Iterable[Window]) -> Standing:
    """Over the first windows of a text, read as bits per byte reads them."""
    assert model.lm_head is not None
    device, right, drafted = model.lm_head.weight.device, 0, 0
    loads: dict[str, Tensor] = {}
    valid = torch.zeros(0, dtype=torch.bool)

    def count(name: str) -> Any:
        def hook(router: Router, _: Any, output: tuple[Tensor, Tensor]) -> None:
            chosen = output[0][valid.flatten()].flatten().cpu()
            counts = torch.bincount(chosen, minlength=router.config.n_routed_experts)
            loads[name] = loads[name] + counts if name in loads else counts

        return hook

    main = {name: router for name, router in model.routers().items() if name.startswith("layers.")}
    hooks = [router.register_forward_hook(count(name)) for name, router in main.items()]
    training = model.training
    model.eval()
    try:
        for ids, targets in batches(_first(windows), 4096):
            ids, valid = ids.to(device), (targets != IGNORE).to(device)
            positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
            hidden = model(ids, positions)
            if model.mtp and ids.shape[1] > 1:
                further = model.predict_further(hidden, ids, positions)[0]  # [B, T - 1, D], of place i token i + 2
                same = model.lm_head(further).argmax(-1) == model.lm_head(hidden[:, 1:]).argmax(-1)
                right, drafted = right + int(same[valid[:, 1:]].sum()), drafted + int(valid[:, 1:].sum())
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    worst = max((max_violation(load) for load in loads.values()), default=None)
    return Standing(worst, right / drafted if drafted else None)


def _first(windows: Iterable[Window]) -> Iterator[Window]:
    seen = 0
    for window in windows:
        if seen and seen + len(window[0]) > TOKENS:
            return
        seen += len(window[0])
        yield window
