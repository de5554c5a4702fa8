"""Pushes: the concepts a sweep steers toward, alone or several at once, and random ones beside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from numbers import Real
from typing import NamedTuple

import torch

from ..directions import Directions
from ..errors import SteeringError

Key = tuple[str, int, float]
"""What was pushed toward, at which layer, and how far."""


@dataclass(frozen=True, eq=False)
class Push:
    """A concept, or several at once, and how much of each makes a strength of 1."""

    label: str
    weights: dict[str, float]

    def at(self, strength: float) -> dict[str, float]:
        return {concept: strength * weight for concept, weight in self.weights.items()}

    def reach(self, directions: Directions, layer: int, strength: float) -> float:
        """How far it pushes, in mean residual norms: for one concept, the strength."""
        rows = [directions.index(concept) for concept in self.weights]
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float32)
        return round(strength * (weights @ directions.vectors[layer][rows]).norm().item(), 4)


class Job(NamedTuple):
    """One trial to be made."""

    key: Key
    directions: Directions
    strengths: dict[str, float]


def pushes_toward(
    directions: Directions, concepts: Iterable[str | Mapping[str, float]] | None
) -> list[Push]:
    """One for each name or mapping, each once; raises SteeringError for weights that are none."""
    if isinstance(concepts, (str, Mapping)):
        concepts = [concepts]
    pushes = []
    for concept in directions.concepts if concepts is None else concepts:
        weights = dict(concept) if isinstance(concept, Mapping) else {concept: 1.0}
        if wild := {name: weight for name, weight in weights.items() if not finite(weight)}:
            raise SteeringError(f"weights must be finite numbers: {wild}")
        weights = {name: float(weight) for name, weight in weights.items() if weight != 0}
        pushes.append(Push(_label(weights), weights))
    return list({push.label: push for push in pushes}.values())


def random_directions(
    directions: Directions, layers: Iterable[int], draws: int, seed: int
) -> Directions:
    """Unit vectors that point anywhere, with the residual norms of `directions`."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {}
    for layer in layers:
        drawn = torch.randn(draws, directions.hidden_size, generator=generator)
        vectors[layer] = torch.nn.functional.normalize(drawn)
    return replace(
        directions, concepts=[f"random {i}" for i in range(draws)], vectors=vectors, eigenvalues={}
    )


def jobs(
    pushes: Sequence[Push],
    directions: Directions,
    controls: Directions,
    layers: Sequence[int],
    strengths: Sequence[float],
) -> list[Job]:
    """Every push, and as far as each every random one; those that are the same only once."""
    found = {}
    for push, layer, strength in product(pushes, layers, strengths):
        key = (push.label, layer, strength)
        found[key] = Job(key, directions, push.at(strength))
    for push, layer, strength in product(pushes, layers, strengths):
        reach = push.reach(directions, layer, strength)
        for name in controls.concepts:
            found[name, layer, reach] = Job((name, layer, reach), controls, {name: reach})
    return list(found.values())


def finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _label(weights: Mapping[str, float]) -> str:
    """calm + 0.5 curious - sad"""
    label = ""
    for concept, weight in weights.items():
        sign = (" - " if weight < 0 else " + ") if label else ("-" if weight < 0 else "")
        label += sign + (str(concept) if abs(weight) == 1 else f"{abs(weight):g} {concept}")
    return label
