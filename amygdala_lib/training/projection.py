"""Gradients as matrices, and their random projections, in pieces that bound the memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from .random_streams import normals

SMALLEST_SIDE = 8  # of a matrix worth projecting
# Entries in work at once: on a CPU they should stay in its cache, elsewhere every launch costs.
_PIECE_ON_CPU, _PIECE = 2**17, 2**24


def is_projected(shape: Sequence[int], rank: int | None) -> bool:
    """Whether a weight of this shape is projected: not if it is a vector or small.

    It has two dimensions, or three, as a layer's experts have: a stack of matrices. Their shorter
    side has to exceed the rank, or the projection would be no smaller than the gradient, and to be
    at least SMALLEST_SIDE. Rank None projects nothing.
    """
    if rank is None or len(shape) not in (2, 3):
        return False
    return min(shape[-2:]) >= max(SMALLEST_SIDE, rank + 1)


def moment_shape(shape: Sequence[int], rank: int | None) -> tuple[int, ...]:
    """Of either moment of a weight: (matrices, rank, longer side), or the weight's own."""
    if not is_projected(shape, rank):
        return tuple(shape)
    return math.prod(shape[:-2]), rank, max(shape[-2:])


def as_matrices(tensor: Tensor) -> Float[Tensor, "matrices short long"]:
    """A view of up to three dimensions as matrices, the shorter side first; a vector as one row."""
    while tensor.ndim < 3:
        tensor = tensor.unsqueeze(0)
    return tensor.mT if tensor.shape[1] > tensor.shape[2] else tensor


def pieces(matrices: Float[Tensor, "matrices short long"]) -> Iterator[tuple[slice, slice, slice]]:
    """Indices that together cover everything once, each whole rows as they lie in memory."""
    n, short, long = matrices.shape
    entries = _PIECE_ON_CPU if matrices.device.type == "cpu" else _PIECE
    together = max(1, entries // max(1, short * long))
    transposed = matrices.stride(1) < matrices.stride(2)
    rows, width = (long, short) if transposed else (short, long)
    height, whole = max(1, entries // max(1, width)), slice(None)
    for first in range(0, n, together):
        which = slice(first, first + together)
        for start in range(0, rows, height):
            these = slice(start, start + height)
            yield (which, whole, these) if transposed else (which, these, whole)


def draw_projections(
    keys: Sequence[int], rank: int, side: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "keys rank side"]:
    """P of each key: entries N(0, 1 / rank), a function of the key alone."""
    drawn = normals(torch.tensor(keys, device=device), rank * side)
    return drawn.mul_(rank**-0.5).view(len(keys), rank, side).to(dtype)


def project(
    projections: Float[Tensor, "keys rank short"], gradient: Float[Tensor, "matrices short long"]
) -> Float[Tensor, "matrices rank long"]:
    """R = P G in the dtype of P, one P for each matrix or for all.

    Of a sharded gradient, summed over the mesh: R is whole on every rank.
    """
    projections = projections.expand(len(gradient), -1, -1)
    if isinstance(gradient, DTensor):
        return (replicated(projections, gradient) @ gradient.to(projections.dtype)).full_tensor()
    if gradient.dtype == projections.dtype:
        return projections @ gradient
    found = projections.new_zeros(len(gradient), projections.shape[1], gradient.shape[2])
    for which, short, long in pieces(gradient):
        part = gradient[which, short, long].to(projections.dtype)
        found[which, :, long].add_(projections[which, :, short] @ part)
    return found


def channel_squares(
    gradient: Float[Tensor, "matrices short long"], dtype: torch.dtype
) -> Float[Tensor, "matrices 1 long"]:
    """Sums of squares along the shorter side, in `dtype`: not finite if any entry is not.

    Of a sharded gradient, summed over the mesh.
    """
    if isinstance(gradient, DTensor):
        return gradient.to(dtype).square().sum(1, keepdim=True).full_tensor()
    found = gradient.new_zeros(len(gradient), 1, gradient.shape[2], dtype=dtype)
    for which, short, long in pieces(gradient):
        part = gradient[which, short, long].to(dtype)
        if short == slice(None):  # the sums run along memory, which needs no copy of the squares
            squares = torch.linalg.vector_norm(part, dim=1, keepdim=True).square_()
        else:
            squares = part.square().sum(1, keepdim=True)
        found[which, :, long].add_(squares)
    return found


def replicated(tensor: Tensor, like: DTensor) -> DTensor:
    """What is the same on every rank, as part of the mesh of `like`."""
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
