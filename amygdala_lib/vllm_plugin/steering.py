"""Steering: what a request asks to be pushed toward, checked, and as vectors to add."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import LiveError

if TYPE_CHECKING:
    from ..directions import Directions

KEY = "amygdala_steering"
"""Where it is in a request's `vllm_xargs`, and in the `extra_args` of its sampling parameters."""

MOST = 10.0
"""The largest strength, of one concept at one layer, in units of its mean residual norm."""

_KEPT = 256  # different steerings whose vectors are kept
_LONGEST = 65536  # characters

Steering = dict[str, Any]
"""{"strengths": {concept: number}, "layers": [...]}, without strengths of 0; {} for none."""


def read_steering(told: object, directions: Directions) -> Steering:
    """What a caller asks for, checked; it may be JSON text, as `vllm_xargs` holds no objects.

    Either {"calm": 0.5}, at all layers of the readout, or {"strengths": {"calm": 0.5},
    "layers": [4]}. Strengths are in units of the layer's mean residual norm, as in `amy.steer`,
    and are added at every position of the request, prompt included. {} is no steering.

    Raises LiveError, naming all that is wrong.
    """
    if isinstance(told, str):
        told = _parsed(told)
    if not isinstance(told, Mapping):
        raise LiveError(
            f'steering is a {type(told).__name__}: give an object such as {{"calm": 0.5}}'
        )
    strengths, layers = told, None
    if "strengths" in told and "strengths" not in directions.concepts:
        strengths, layers = told["strengths"], told.get("layers")
        if unknown := sorted(str(name) for name in told.keys() - {"strengths", "layers"}):
            raise LiveError(f"steering: no {', '.join(unknown)[:200]}; there are strengths, layers")
    problems = _wrong_strengths(strengths, directions)
    layers, wrong = _layers(layers, directions)
    if problems + wrong:
        raise LiveError("\n".join(problems + wrong))
    kept = {concept: float(strength) for concept, strength in strengths.items() if strength}
    return {"strengths": dict(sorted(kept.items())), "layers": layers} if kept else {}


def digest(steering: Steering) -> str:
    """The same for the same steering, and for no other."""
    return hashlib.sha256(json.dumps(steering, sort_keys=True).encode()).hexdigest()[:32]


class Pushes:
    """The vectors that steerings add, at each layer, on a worker's device."""

    def __init__(self, directions: Directions, device: torch.device):
        self.device = device
        self._rows = {concept: row for row, concept in enumerate(directions.concepts)}
        self._units = {
            layer: (directions.residual_norms[layer] * directions.vectors[layer].float()).to(device)
            for layer in directions.layers
            if layer in directions.residual_norms
        }
        self._kept: dict[str, dict[int, Float[Tensor, " hidden"]]] = {}

    def of(self, steerings: Sequence[Steering]) -> dict[int, Float[Tensor, "requests hidden"]]:
        """What to add to each request's rows, at every layer where one of them is steered."""
        pushes = [self._push(steering) for steering in steerings]
        layers = sorted(set().union(*pushes))
        nothing = torch.zeros_like(next(iter(self._units.values()))[0])
        return {
            layer: torch.stack([push.get(layer, nothing) for push in pushes]) for layer in layers
        }

    def _push(self, steering: Steering) -> dict[int, Float[Tensor, " hidden"]]:
        key = json.dumps(steering, sort_keys=True)
        if key not in self._kept:
            if len(self._kept) >= _KEPT:
                self._kept.pop(next(iter(self._kept)))
            strengths = steering["strengths"]
            rows = [self._rows[concept] for concept in strengths]
            weights = torch.tensor(list(strengths.values()), device=self.device)
            self._kept[key] = {
                layer: weights @ self._units[layer][rows] for layer in steering["layers"]
            }
        return self._kept[key]


def _parsed(text: str) -> object:
    if len(text) > _LONGEST:
        raise LiveError(f"steering has {len(text):,} characters: at most {_LONGEST:,} are taken")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LiveError(
            f'steering is no JSON ({error}): give text such as {{"calm": 0.5}}'
        ) from error


def _wrong_strengths(strengths: object, directions: Directions) -> list[str]:
    if not isinstance(strengths, Mapping):
        return [f'strengths is a {type(strengths).__name__}: give {{"calm": 0.5}}']
    problems = []
    for concept, strength in strengths.items():
        if concept not in directions.concepts:
            near = difflib.get_close_matches(str(concept)[:100], directions.concepts)
            hint = f"do you mean {' or '.join(near)}?" if near else "GET /v1/amygdala/steering"
            problems.append(f"no direction for {str(concept)[:100]!r}: {hint}")
        number = type(strength) in (int, float) and math.isfinite(strength)
        if not (number and abs(strength) <= MOST):
            problems.append(
                f"the strength of {str(concept)[:100]!r} is {str(strength)[:40]}: give a number "
                f"from {-MOST:g} to {MOST:g}"
            )
    return problems[:20]


def _layers(layers: object, directions: Directions) -> tuple[list[int], list[str]]:
    there = [layer for layer in directions.layers if layer in directions.residual_norms]
    if not there:
        return [], [
            "the readout says no residual norms, the unit of strength: extract the directions again"
        ]
    if layers is None:
        return there, []
    whole = isinstance(layers, Sequence) and all(type(layer) is int for layer in layers)
    if not (whole and layers and set(layers) <= set(there)):
        return [], [f"layers is {str(layers)[:100]}: give a list of some of {there}"]
    return sorted(set(layers)), []
