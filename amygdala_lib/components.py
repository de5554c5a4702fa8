"""The heads and neurons of a block: which linear map writes them into the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from .models import LanguageModel, find_layers

Site = Literal["residual", "attn_heads", "mlp_neurons"]
SITES = ("residual", "attn_heads", "mlp_neurons")
Kind = Literal["attention", "GatedDeltaNet", "MLP"]

# By the path within a block; transformers has about as many names as it has families.
_HEADS: dict[str, Kind] = {
    "linear_attn.out_proj": "GatedDeltaNet",
    "self_attn.o_proj": "attention",
    "self_attn.out_proj": "attention",
    "self_attn.dense": "attention",
    "self_attention.dense": "attention",
    "attention.dense": "attention",
    "attention.output.dense": "attention",
    "attn.c_proj": "attention",
    "attn.out_proj": "attention",
}
_NEURONS: dict[str, Kind] = dict.fromkeys(
    (
        "mlp.down_proj",
        "mlp.c_proj",
        "mlp.dense_4h_to_h",
        "mlp.fc2",
        "mlp.fc_out",
        "output.dense",
        "fc2",
    ),
    "MLP",
)


@dataclass(frozen=True, eq=False)
class Output:
    """The linear map through which a block's heads, or its neurons, write the residual stream.

    Its input is the heads' outputs side by side, gates and norms already applied, or the neurons'
    activations; `parts` is how many heads or neurons these are.
    """

    module: nn.Module
    kind: Kind
    parts: int

    @property
    def weight(self) -> Float[Tensor, "hidden inputs"]:
        """Float32 on the CPU: column j is what input j writes."""
        weight = self.module.weight.detach().to("cpu", torch.float32)
        return weight.T if type(self.module).__name__ == "Conv1D" else weight


def find_output(
    lm: LanguageModel | PreTrainedModel, layer: int, site: Literal["attn_heads", "mlp_neurons"]
) -> Output | None:
    """Where the heads or neurons of block `layer` are written; None if it has none we know.

    Routed experts have none: each token goes through other neurons, in other proportions.
    """
    model, blocks = _parts(lm)
    block = blocks[layer]
    for path, kind in (_HEADS if site == "attn_heads" else _NEURONS).items():
        try:
            module = block.get_submodule(path)
        except AttributeError:
            continue
        if kind == "MLP":
            return Output(module, kind, _width(module))
        if kind == "GatedDeltaNet":
            return Output(module, kind, block.linear_attn.num_v_heads)
        return Output(module, kind, model.config.get_text_config().num_attention_heads)
    return None


def layers_with(
    lm: LanguageModel | PreTrainedModel, layers: Sequence[int], site: Site
) -> list[int]:
    """Those of `layers` that have heads, or neurons, to look at."""
    if site == "residual":
        return list(layers)
    return [layer for layer in layers if layer >= 0 and find_output(lm, layer, site)]


def _parts(lm: LanguageModel | PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    return (lm.model, lm.layers) if isinstance(lm, LanguageModel) else (lm, find_layers(lm))


def _width(module: nn.Module) -> int:
    return module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1]
