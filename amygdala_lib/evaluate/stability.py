"""Stability: how far directions depend on which texts they happened to be made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..corpus import Corpus
from .scores import Reader
from .splits import Part, resampled, stratified


@dataclass(frozen=True, eq=False)
class Redraws:
    """Other texts that directions could have been made of: halves, and texts drawn anew."""

    halves: list[tuple[Part, Part]]
    bootstraps: list[Part]

    @classmethod
    def of(cls, corpus: Corpus, repeats: int, seed: int) -> Redraws:
        """`repeats` times two random halves of each concept's texts, and as often a bootstrap."""
        halves, bootstraps = [], []
        for repeat in range(repeats):
            rng = np.random.default_rng([seed, repeat])
            half = stratified(corpus, 2, rng)
            first, second = (Part.of(corpus, np.flatnonzero(half == n)) for n in (0, 1))
            halves.append((first, second))
            bootstraps.append(resampled(corpus, rng))
        return cls(halves, bootstraps)

    def cosines(
        self, reader: Reader, of_everything: Float[Tensor, "concepts hidden"]
    ) -> dict[str, Float[np.ndarray, " concepts"]]:
        """Mean cosine between halves' directions, and of bootstraps' with those of all texts.

        Halves have half the texts, so `split_half` is lower than two full sets' would be; it is not
        corrected for that. NaN for a concept without a direction in any repeat.
        """
        halves = [_cosine(reader.fit(first), reader.fit(second)) for first, second in self.halves]
        bootstraps = [_cosine(reader.fit(part), of_everything) for part in self.bootstraps]
        return {
            "split_half": torch.stack(halves).nanmean(0).numpy(),
            "bootstrap": torch.stack(bootstraps).nanmean(0).numpy(),
        }


def _cosine(
    first: Float[Tensor, "concepts hidden"], second: Float[Tensor, "concepts hidden"]
) -> Float[Tensor, " concepts"]:
    return (first * second).sum(1).double()
