"""TIES: task vectors merged into one where they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import TrainingError
from .named_weights import misfits, wide
from .task_vectors import TaskVector

Convention = Literal["mergekit", "peft"]
CONVENTIONS = ("mergekit", "peft")


def ties_merge(
    vectors: Sequence[TaskVector],
    *,
    density: float = 0.2,
    weights: Sequence[float] | None = None,
    convention: Convention = "mergekit",
) -> TaskVector:
    """TIES: trim, elect signs, average what agrees (Yadav et al. 2023, arXiv 2306.01708).

    Each vector keeps the int(density * n) entries of largest magnitude of each tensor; of equal
    ones the first. The sign of each entry is that of the sum over the vectors, + for 0. Then, over
    the entries t_i that have this sign, with weights w_i (1 by default):

    - `mergekit`: signs elected on w_i t_i; the merged entry is sum(w_i t_i) / sum(w_i)
    - `peft`: signs elected on t_i; the merged entry is sum(w_i t_i) / the number of them

    and 0 where there are none (mergekit: the plain sum, where their weights cancel out). With
    weights of 1 they are the same. All in float32; mergekit itself computes in the model's dtype.
    Like all vectors it is computed when asked for, from one tensor of each vector in turn.

    Raises TrainingError, naming everything that is wrong, for vectors that do not fit one another,
    no vectors, a density out of (0, 1], or weights that are not one finite number per vector.
    """
    problems = []
    weights = [1.0] * len(vectors) if weights is None else list(map(float, weights))
    if not vectors:
        problems.append("no vectors to merge")
    if not 0 < density <= 1:
        problems.append(f"density is {density}: the share of entries to keep, above 0 and up to 1")
    if len(weights) != len(vectors) or not all(map(math.isfinite, weights)):
        problems.append(f"weights are {weights}: give {len(vectors)} finite numbers")
    if convention not in CONVENTIONS:
        problems.append(f"no convention {convention!r}: choose one of {', '.join(CONVENTIONS)}")
    for number, vector in enumerate(vectors[1:], start=2):
        layouts = {"first vector": vectors[0].layout, f"vector {number}": vector.layout}
        problems += misfits(layouts, dtypes=True)
    if problems:
        raise TrainingError("\n".join(problems))
    pulls = weights if convention == "mergekit" else [1.0] * len(vectors)
    layout = vectors[0].layout

    def merged(name: str) -> Tensor:
        def trimmed(number: int) -> Tensor:
            return _trim(wide(vectors[number][name]), density)

        # Trimmed twice rather than kept: memory then does not grow with the number of vectors.
        elected = sum(pull * trimmed(number) for number, pull in enumerate(pulls))
        sign = torch.where(elected >= 0, 1.0, -1.0)
        total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
        for number, (pull, weight) in enumerate(zip(pulls, weights, strict=True)):
            entries = trimmed(number)
            agrees = (pull * entries).sign() == sign
            total += torch.where(agrees, weight * entries, 0)
            divisor += pull * agrees
        return (total / divisor.where(divisor != 0, 1)).to(layout[name].dtype)

    origin = {"operation": "ties", "convention": convention, "density": density}
    origin |= {"weights": weights, "of": [vector.provenance for vector in vectors]}
    return TaskVector(layout, merged, origin)


def _trim(tensor: Tensor, density: float) -> Tensor:
    """Zeros but for the int(density * n) entries of largest magnitude."""
    kept = int(density * tensor.numel())
    if kept == tensor.numel():
        return tensor
    if kept == 0:
        return torch.zeros_like(tensor)
    sizes = tensor.abs().flatten()
    place = tensor.numel() - kept
    least = float(np.partition(sizes.numpy(), place)[place])  # quicker than kthvalue
    keep = sizes > least
    # topk would take any of those as large as the least.
    level = (sizes == least).nonzero()[:, 0]
    keep[level[: kept - int(keep.sum())]] = True
    return torch.where(keep.view(tensor.shape), tensor, 0)
