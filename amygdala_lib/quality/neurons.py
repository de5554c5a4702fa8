"""Is a direction nearly one neuron, and which neurons write it?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..components import Output
from ..directions import mean_differences


def neuron_cosines(
    output: Output, vectors: Float[Tensor, "concepts hidden"]
) -> Float[Tensor, "concepts neurons"]:
    """Cosine of each unit direction with what each neuron writes, its column of down_proj."""
    return vectors @ torch.nn.functional.normalize(output.weight, dim=0)


def neuron_contributions(
    outputs: Float[Tensor, "texts neurons"],
    output: Output,
    vectors: Float[Tensor, "concepts hidden"],
    belongs: Float[Tensor, "concepts texts"],
) -> Float[Tensor, "concepts neurons"]:
    """What each neuron writes along each direction: a (W_down^T v), positives minus others.

    `outputs` are the activations a, silu(gate) * up in a gated MLP, as capture(site="mlp_neurons")
    has them. In units of the residual stream; the neurons add up to the MLP's whole effect along v.
    """
    return mean_differences(outputs, belongs) * (vectors @ output.weight)
