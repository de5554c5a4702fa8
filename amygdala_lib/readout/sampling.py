"""Sampling: what `generate` draws, from a random generator of its own."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..errors import AmygdalaError


class Sampling(LogitsProcessor):
    """Draws tokens at a temperature from a seed: pass it with `do_sample=False`.

    Gumbel noise is added to the scores, of which `generate` then takes the highest: that is a draw
    from their softmax (Gumbel, 1954; Maddison, Tarlow & Minka, 2014, arXiv:1411.0030). `generate`
    draws from torch's global generator, which another thread may be using; this touches none but
    its own, and the same seed gives the same noise on every device. Two runs of one seed differ
    only where the model does: a steered and an unsteered one, say.

    One use each: the noise goes on where it was. Temperature 0 takes the likeliest token. Raises
    AmygdalaError for a negative temperature.
    """

    def __init__(self, seed: int, temperature: float = 1.0):
        if not temperature >= 0:
            raise AmygdalaError(
                f"temperature is {temperature}: pass 0 (the likeliest token) or more"
            )
        self.temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(
        self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        if self.temperature == 0:
            return scores
        uniform = torch.rand(scores.shape, generator=self._generator, dtype=torch.float64)
        noise = -torch.log(-torch.log(uniform.clamp_(min=torch.finfo(torch.float64).tiny)))
        return scores / self.temperature + noise.to(scores)


def sampled(seed: int, temperature: float) -> dict[str, Any]:
    """Options of `generate` that draw with `Sampling`, whatever the model's own settings are."""
    return {
        "do_sample": False,
        "num_beams": 1,
        "logits_processor": LogitsProcessorList([Sampling(seed, temperature)]),
        # What other models come with for do_sample=True, and generate would warn of.
        **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p")),
    }
