"""Lets vLLM 0.32 read weights again on a CPU; its workers, which import this file, are begun with

    PYTHONPATH=scripts … --worker-extension-cls vllm_cpu_reload.Repacking

vLLM brings the experts into the order that its CPU kernel reads when they are loaded first, and not when they are read
again (`UnquantizedFusedMoEMethod._setup_kernel`): then every token's experts are wrong, and nothing says so.
"""

from typing import Any

from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

as_it_was = UnquantizedFusedMoEMethod._setup_kernel


def repacked(self: Any, layer: Any, w13: Any, w2: Any) -> None:
    again = self.moe_kernel is not None
    as_it_was(self, layer, w13, w2)
    if again:
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)


UnquantizedFusedMoEMethod._setup_kernel = repacked


class Repacking:
    """Nothing: that the workers import this file is what counts."""
