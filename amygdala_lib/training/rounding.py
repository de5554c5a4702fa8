"""Stochastic rounding: bfloat16 weights that follow updates smaller than their last digit."""

from __future__ import annotations

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

from .random_streams import random_bits

_LOW_BITS = 0xFFFF  # what float32 has and bfloat16 has not


def round_stochastically(
    values: Float32[Tensor, "*shape"], key: int, start: int = 0
) -> BFloat16[Tensor, "*shape"]:
    """To one of the two nearest bfloat16, the nearer the likelier, so that the mean is kept.

    bfloat16 has 8 significant bits: a weight of 1 rounded to nearest stays 1 under any update
    smaller than 0.002, however often it comes. The noise, entry by entry as they lie in memory,
    begins at position `start`, a multiple of 4, of the stream `key`. What bfloat16 can hold,
    infinity and NaN come through as they are.
    """
    transposed = values.ndim > 1 and not values.is_contiguous()
    if transposed:
        values = values.mT.contiguous()
    keys = torch.tensor([key], device=values.device)
    words = random_bits(keys, start // 4, (values.numel() + 3) // 4)
    noise = words.view(torch.int16).flatten()[: values.numel()].view(values.shape)
    noised = noise.to(torch.int32).bitwise_and_(_LOW_BITS).add_(values.view(torch.int32))
    rounded = noised.bitwise_and_(~_LOW_BITS).view(torch.float32).to(torch.bfloat16)
    return rounded.mT if transposed else rounded
