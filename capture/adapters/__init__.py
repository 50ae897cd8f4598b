"""One file per oddity of a model family: what has to be said or replaced before it is traced.

An adapter changes a model on the meta device that is ours alone, never a model of the user's.
"""

from collections.abc import Callable, Mapping

from torch import nn
from transformers import PreTrainedModel

from dovetail.capture.adapters import dbrx, jetmoe, llama4, longcat, position_grids
from dovetail.capture.adapters.whole_classes import WHOLE

__all__ = ["WHOLE", "adapt"]

Adapter = Callable[[nn.Module], None]
_BY_CLASS: Mapping[str, Adapter] = {
    "DbrxExperts": dbrx.experts,
    "JetMoeMoE": jetmoe.experts,
    "JetMoeTopKGating": jetmoe.gating,
    "Llama4TextMoe": llama4.experts,
    "Llama4TextAttention": llama4.temperature,
    "LongcatFlashExperts": longcat.experts,
    "Qwen3_5MoeTextRotaryEmbedding": position_grids.text_only,
}


def adapt(model: PreTrainedModel) -> None:
    """Make the modules of ``model`` that have an adapter call the operators that stay opaque."""
    for name, module in model.named_modules():
        adapter = _BY_CLASS.get(type(module).__name__)
        if adapter is not None:
            module._dovetail_fqn = name
            adapter(module)
