"""Random numbers as a function of a key and a position: none is stored, all devices agree."""

from __future__ import annotations

import math
from hashlib import blake2b

import torch
from jaxtyping import Float, Int
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as signed 64-bit integers, which wrap alike.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FIRST_FACTOR = 0xBF58476D1CE4E5B9 - 2**64
_SECOND_FACTOR = 0x94D049BB133111EB - 2**64


def stream_key(*parts: object) -> int:
    """A signed 64-bit key from anything that has a text: a seed, a name, a count."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little", signed=True)


def random_bits(keys: Int[Tensor, " streams"], start: int, count: int) -> Int[Tensor, "streams n"]:
    """64 random bits at each of the positions start to start + count, for every key, as int64.

    A stream can be had in pieces, and does not depend on the device. Python's and torch's global
    random states are neither read nor changed.
    """
    mixed = torch.arange(start + 1, start + count + 1, device=keys.device)
    mixed = mixed.mul_(_INCREMENT) + keys[:, None]
    _xor_shifted(mixed, 30).mul_(_FIRST_FACTOR)
    _xor_shifted(mixed, 27).mul_(_SECOND_FACTOR)
    return _xor_shifted(mixed, 31)


def normals(keys: Int[Tensor, " streams"], count: int) -> Float[Tensor, "streams n"]:
    """`count` standard normal numbers for every key, float32, by Box and Muller's transform.

    From equal bits; logarithm and cosine may differ in the last digit from device to device.
    """
    pairs = (count + 1) // 2
    halves = random_bits(keys, 0, pairs).view(torch.int32).view(len(keys), pairs, 2)
    uniform = halves.float().mul_(2.0**-32).add_(0.5)
    radius = uniform[..., 0].clamp_min(2.0**-25).log_().mul_(-2).sqrt_()
    angle = uniform[..., 1] * (2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def _xor_shifted(bits: Tensor, by: int) -> Tensor:
    """bits ^ (bits >> by) in place, with zeros shifted in: int64 would shift in its sign."""
    return bits.bitwise_xor_((bits >> by).bitwise_and_((1 << (64 - by)) - 1))
