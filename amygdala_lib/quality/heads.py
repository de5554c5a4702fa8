"""Which heads carry a concept, in attention and GatedDeltaNet layers alike."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..components import Output
from ..directions import mean_differences


def head_differences(
    outputs: Float[Tensor, "texts inputs"], heads: int, belongs: Float[Tensor, "concepts texts"]
) -> tuple[Float[Tensor, "concepts heads"], Float[Tensor, "concepts heads"]]:
    """How far apart a head's outputs are on a concept's texts and on all others.

    Returns the norm of the difference of means, in the head's own units, and that norm over the
    spread of the negatives (the root of their variance, summed over the head's dimensions): the
    head's selectivity. `outputs` are the heads side by side, as capture(site="attn_heads") has
    them.
    """
    difference = mean_differences(outputs, belongs).unflatten(1, (heads, -1))
    norms = difference.norm(dim=2)
    outputs, negatives = outputs - outputs.mean(0), 1 - belongs.to(outputs)
    counts = negatives.sum(1, keepdim=True)
    means, squares = negatives @ outputs / counts, negatives @ outputs.square() / counts
    spread = (squares - means.square()).clamp(min=0).unflatten(1, (heads, -1)).sum(2).sqrt()
    # A head that says the same everywhere selects nothing.
    return norms, torch.where(spread > 0, norms / spread, torch.zeros_like(norms))


def head_effects(
    outputs: Float[Tensor, "texts inputs"],
    output: Output,
    vectors: Float[Tensor, "concepts hidden"],
    belongs: Float[Tensor, "concepts texts"],
) -> Float[Tensor, "concepts heads"]:
    """What each head writes along each direction: v . W_O[:, head] z_head, positives minus others.

    In units of the residual stream. Exact where a block adds what W_O puts out as it is (not in
    BERT, which normalises the sum): the heads then add up to the layer's whole effect along v, but
    for W_O's bias, which is the same for every text.
    """
    contributions = mean_differences(outputs, belongs) * (vectors @ output.weight)
    return contributions.unflatten(1, (output.parts, -1)).sum(2)
