"""Comparison: what a change of weights is held against: another one, chance, or another way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TrainingError
from .named_weights import refuse_misfits, wide
from .random_streams import normals, stream_key
from .task_vectors import TaskVector


class Outcome(NamedTuple):
    """What one way of changing a model led to: its effect on some texts, its cost on others.

    NaN for a text of which nothing can be said.
    """

    effect: Float[np.ndarray, " prompts"]
    cost: Float[np.ndarray, " texts"]


def cost_at_equal_effect(
    outcome: Outcome, curve: Sequence[Outcome], *, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean cost of an outcome, less that of a curve of others where it has the same mean effect.

    The curve (one way at several doses) is interpolated between the doses whose effects lie next to
    each other. With a 95% bootstrap interval over prompts and texts, resampled for all outcomes
    together; samples in which the outcome's effect is beyond the curve say nothing and are left
    out. NaN three times if it is beyond the curve in all the texts.

    Raises TrainingError, naming all that is wrong, for a curve of fewer than two outcomes, or
    outcomes of other numbers of prompts or texts.
    """
    sizes = [(len(each.effect), len(each.cost)) for each in (outcome, *curve)]
    problems = [] if len(curve) > 1 else [f"a curve of {len(curve)} outcomes: give two or more"]
    if len(set(sizes)) > 1:
        problems.append(f"outcomes of other prompts or texts: their numbers are {sizes}")
    if problems:
        raise TrainingError("\n".join(problems))
    effects, costs = (np.array([each[part] for each in (outcome, *curve)]) for part in (0, 1))
    found = _above_curve(np.nanmean(effects, axis=1), np.nanmean(costs, axis=1))
    if np.isnan(found):
        return np.nan, np.nan, np.nan
    rng, (prompts, texts) = np.random.default_rng(seed), sizes[0]
    drawn = []
    for _ in range(draws):
        at, of = rng.integers(prompts, size=prompts), rng.integers(texts, size=texts)
        drawn.append(
            _above_curve(np.nanmean(effects[:, at], axis=1), np.nanmean(costs[:, of], axis=1))
        )
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(found), float(low), float(high)


def interference(
    first: TaskVector, second: TaskVector, groups: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Where two vectors pull the same weights, and whether they pull the same way.

    A row per weight, by name, or per group of `groups` (name of a weight to name of its group, such
    as `TrainingResult.changes["part"]`; weights without a group are left out). `cosine` of the two
    vectors there; `entries` that both change; `conflicts`, the share of these in which they have
    opposite signs; `norm_first` and `norm_second`. Unrelated vectors have a cosine of 0 and half of
    the signs in conflict. NaN where one of them changes nothing.

    Raises TrainingError, naming everything that differs, for vectors that do not fit one another.
    """
    refuse_misfits({"first": first.layout, "second": second.layout}, dtypes=False)
    named = {name: name for name in first.names} if groups is None else groups
    rows = [
        {"group": named[name], **_overlap(wide(first[name]), wide(second[name]))}
        for name in first.names
        if name in named
    ]
    found = pd.DataFrame(rows).groupby("group", sort=False).sum()
    norms = np.sqrt(found[["square_first", "square_second"]])
    with np.errstate(invalid="ignore"):
        cosine = found["product"] / norms.prod(axis=1)
        conflicts = found["opposite"] / found["both"]
    return pd.DataFrame(
        {
            "cosine": cosine,
            "conflicts": conflicts,
            "entries": found["both"].astype(int),
            "norm_first": norms["square_first"],
            "norm_second": norms["square_second"],
        }
    ).rename_axis("weight" if groups is None else "group")


def random_like(vector: TaskVector, seed: int = 0) -> TaskVector:
    """The control: normally distributed entries, each weight's of the norm it has in `vector`.

    Drawn on the CPU from `seed` and the weight's name, so that it is the same in whatever order its
    tensors are asked for. Global random state is neither read nor moved.
    """

    def drawn(name: str) -> Tensor:
        wanted = wide(vector[name])
        key = torch.tensor([stream_key(seed, name)])
        entries = normals(key, wanted.numel()).view(wanted.shape).to(wanted.dtype)
        size = entries.norm()
        entries *= wanted.norm() / size.where(size > 0, 1)
        return entries.to(vector.layout[name].dtype)

    origin = {"operation": "random", "seed": seed, "of": [vector.provenance]}
    return TaskVector(vector.layout, drawn, origin)


def _above_curve(
    effects: Float[np.ndarray, " outcomes"], costs: Float[np.ndarray, " outcomes"]
) -> float:
    """The first cost, less what the others cost at the first effect; NaN beyond them."""
    order = 1 + np.argsort(effects[1:], kind="stable")
    ends = {"left": np.nan, "right": np.nan}
    return costs[0] - np.interp(effects[0], effects[order], costs[order], **ends)


def _overlap(first: Tensor, second: Tensor) -> dict[str, float]:
    """Sums over the entries of one weight, in float64."""
    a, b = first.double().flatten(), second.double().flatten()
    both = (a != 0) & (b != 0)
    return {
        "product": (a @ b).item(),
        "square_first": (a @ a).item(),
        "square_second": (b @ b).item(),
        "both": int(both.sum()),
        "opposite": int((both & (a.sign() != b.sign())).sum()),
    }
