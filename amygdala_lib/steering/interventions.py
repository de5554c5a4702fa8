"""Interventions: what steering does to the residual stream of one layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Intervention = Callable[[Float[Tensor, "*batch hidden"]], Float[Tensor, "*batch hidden"]]
"""Gives a new tensor of the same dtype, on the same device."""

_DEPENDENT = 1e-5
"""Vectors whose singular value is smaller than this share of the largest add no direction."""
_FAR = 10.0
"""A change this many times as long as the levels asked for would wipe everything else out."""


def add(push: Float[Tensor, " hidden"]) -> Intervention:
    """h + push."""
    placed = _Placed(push)
    return lambda hidden: hidden + placed(hidden.device, hidden.dtype)


def project_out(vectors: Float[Tensor, "concepts hidden"]) -> Intervention:
    """h without its part in the joint span of the vectors, so that correlated ones all go.

    Directional ablation of Arditi et al. 2024 (arXiv:2406.11717, equation 4), for several vectors.
    """
    basis = _decompose(vectors)[2]
    return _hold(basis, basis.new_zeros(len(basis)))


def clamp(
    vectors: Float[Tensor, "concepts hidden"], levels: Float[Tensor, " concepts"]
) -> Intervention | None:
    """The nearest to h whose projections on all vectors are the levels, solved jointly.

    None if there is no such, or only one very far off: the vectors are almost one direction and the
    levels differ.
    """
    left, sizes, basis = _decompose(vectors)
    wanted = levels.double()
    inside = (left.T @ wanted) / sizes
    missed = vectors.double() @ (basis.T @ inside) - wanted
    if missed.norm() > 1e-3 * wanted.norm() or inside.norm() > _FAR * wanted.norm():
        return None
    return _hold(basis, inside)


def _hold(basis: Float[Tensor, "n hidden"], levels: Float[Tensor, " n"]) -> Intervention:
    """h + (levels - basis h) basis: sets the projections on the rows of an orthonormal basis."""
    placed_basis, placed_levels = _Placed(basis), _Placed(levels)

    def held(hidden: Tensor) -> Tensor:
        # In float32, or what is left of a concept would be a matter of bfloat16's rounding twice.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        rows, wide = placed_basis(hidden.device, dtype), hidden.to(dtype)
        change = (placed_levels(hidden.device, dtype) - wide @ rows.T) @ rows
        return (wide + change).to(hidden.dtype)

    return held


def _decompose(
    vectors: Float[Tensor, "concepts hidden"],
) -> tuple[Float[Tensor, "concepts n"], Float[Tensor, " n"], Float[Tensor, "n hidden"]]:
    """Singular value decomposition in float64, without the directions that are not there."""
    left, sizes, basis = torch.linalg.svd(vectors.double(), full_matrices=False)
    kept = sizes > _DEPENDENT * sizes[0]
    return left[:, kept], sizes[kept], basis[kept]


class _Placed:
    """A tensor on whatever devices and in whatever dtypes it is asked for; each made once."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if (device, dtype) not in self.copies:
            self.copies[device, dtype] = self.tensor.to(device, dtype)
        return self.copies[device, dtype]
