"""Readout: what each request's tokens held of every concept, in a ring of fixed size."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from ..directions import Directions

RING_BYTES = 64 << 20
"""Memory of a recorder: 60,000 tokens of 64 concepts at 4 layers, say."""

_NUMBERED = re.compile(r"(-\d+)?(-[0-9a-f]{8})?")
"""What vLLM appends to a request's id: the number of its prompt, and eight random digits."""


class Sequence(NamedTuple):
    """The rows that are kept of one: vLLM's id, and the numbers of its generated tokens, from 0."""

    name: str
    positions: list[int]
    values: Float[Tensor, "tokens layers concepts"]


class Recorder:
    """Projections on all concepts at all layers, a row per generated token.

    The last `capacity` rows are kept, on the device they were computed on; a request of which none
    is left is forgotten.
    """

    def __init__(self, directions: Directions, device: torch.device, n_bytes: int = RING_BYTES):
        vectors = torch.stack([directions.vectors[layer] for layer in directions.layers])
        self._vectors = vectors.float().to(device).transpose(1, 2).contiguous()
        shape = (len(directions.layers), len(directions.concepts))
        self.capacity = max(1, n_bytes // (4 * shape[0] * shape[1]))
        self._ring = torch.zeros(self.capacity, *shape, device=device)
        self.written = 0
        self._rows: OrderedDict[str, dict[int, int]] = OrderedDict()
        """By request: the number of a row, counted from the start, for each generated token."""

    def record(
        self,
        requests: list[str],
        token: Int[np.ndarray, " requests"],
        chooses: np.ndarray,
        states: Float[Tensor, "layers requests hidden"],
    ) -> None:
        """Keep a row for each request that chooses a token in this step; see `hooks.Step`."""
        kept = np.flatnonzero(chooses)[-self.capacity :]
        if not len(kept):
            return
        # All of them at once, in float32: bfloat16 keeps too few digits of a projection.
        values = torch.bmm(states.float(), self._vectors).transpose(0, 1)
        numbers = self.written + np.arange(len(kept))
        device = self._ring.device
        places = torch.as_tensor(numbers % self.capacity, device=device)
        self._ring[places] = values[torch.as_tensor(kept, device=device)]
        for j, number in zip(kept.tolist(), numbers.tolist(), strict=True):
            # By the token's number: one that vLLM takes back and chooses anew is one row.
            self._rows.setdefault(requests[j], {})[int(token[j])] = number
            self._rows.move_to_end(requests[j])
        self.written += len(kept)
        self._forget()

    def of(self, request: str) -> list[Sequence]:
        """What is kept of a request, by the id its caller knows or by vLLM's own.

        There are several sequences for several prompts, or n > 1.
        """
        oldest = self.written - self.capacity
        found = []
        for name, rows in self._rows.items():
            if belongs(name, request):
                kept = sorted((token, number) for token, number in rows.items() if number >= oldest)
                places = [number % self.capacity for _, number in kept]
                values = self._ring[torch.as_tensor(places, device=self._ring.device)]
                found.append(Sequence(name, [token for token, _ in kept], values.cpu()))
        return found

    def _forget(self) -> None:
        oldest = self.written - self.capacity
        while self._rows:
            # The first is the one that was written to the longest ago.
            name, rows = next(iter(self._rows.items()))
            if max(rows.values()) >= oldest:
                return
            del self._rows[name]


def belongs(name: str, request: str) -> bool:
    """Whether vLLM's id of a sequence is one of the request its caller knows by `request`.

    It is the same, or followed by numbers that vLLM appends; of n > 1, preceded by "0_", "1_" ...
    """
    start, _, rest = name.partition("_")
    if start.isdigit() and rest.startswith(request):
        name = rest
    return name.startswith(request) and bool(_NUMBERED.fullmatch(name[len(request) :]))
