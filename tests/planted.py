"""Corpora and activations made on the spot, with directions planted where we know them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from amygdala_lib import Activations
from amygdala_lib.corpus import Corpus, Text


def labelled(labels: Sequence[str | None]) -> Corpus:
    """A corpus of one short text per label; None is a text without a concept."""
    entries = [Text(f"text {i}", "story", c, None, None, "here") for i, c in enumerate(labels)]
    return made_of(entries)


def made_of(entries: list[Text]) -> Corpus:
    """A corpus of these training texts and nothing else."""
    return Corpus(
        root=Path("made here"),
        manifest={},
        concepts=sorted({entry.concept for entry in entries if entry.concept}),
        entries=entries,
        neutral=[],
        heldout=[],
        min_positives=1,
    )


def activations(
    corpus: Corpus | Sequence[str],
    values: Float[Tensor, "texts hidden"] | list[Float[Tensor, "tokens hidden"]],
    **changes: object,
) -> Activations:
    """Activations of a corpus' texts at layer 2, as `capture` would have read them."""
    rows = torch.cat(values) if isinstance(values, list) else values
    facts = {
        "texts": corpus.texts if isinstance(corpus, Corpus) else list(corpus),
        "layers": [2],
        "pool": "tokens" if isinstance(values, list) else "last",
        "skip": 0,
        "chat_template": False,
        "residual_norms": {2: rows.norm(dim=-1).mean().item()},
        "model_name": "made here",
        "model_revision": "0",
        "model_hash": "0",
        "n_layers": 4,
        "reused": 0,
        "_by_layer": {2: values},
    }
    return Activations(**facts | changes)


@dataclass(frozen=True, eq=False)
class Planted:
    """Texts of which each is content + its concept's direction + noise, and neutral texts."""

    corpus: Corpus
    directions: Float[Tensor, "concepts hidden"]
    texts: Float[Tensor, "texts hidden"]
    tokens: list[Float[Tensor, "tokens hidden"]]
    neutral: Float[Tensor, "neutral hidden"]


def plant(
    *,
    concepts: int = 95,
    per_concept: int = 20,
    hidden: int = 256,
    nuisances: int = 5,
    strength: float = 5.0,
    noise: float = 0.1,
    framings: int = 5,
    tokens: int = 10,
    seed: int = 0,
) -> Planted:
    """Scenarios whose content varies `strength` times as much as a concept moves a text.

    Content lies in a few nuisance directions, is the scenario's own and shared by its `framings`.
    Neutral texts vary in the same directions. A concept moves its texts by 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    directions = torch.nn.functional.normalize(normal(concepts, hidden))
    axes = torch.linalg.qr(normal(hidden, nuisances))[0].T
    shared = 10 * normal(hidden)
    entries, rows, labels = [], [], []
    for round_number in range(per_concept):
        order = torch.randperm(concepts, generator=generator).tolist()
        for start in range(0, concepts, framings):
            content = strength * normal(nuisances) @ axes
            for concept in order[start : start + framings]:
                name, scenario = f"concept_{concept:03d}", f"{round_number}-{start}"
                text = f"{scenario} told as {name}"
                entries.append(Text(text, "paired", name, scenario, 0, "here"))
                rows.append(shared + content + directions[concept])
                labels.append(concept)
    means = torch.stack(rows)
    texts = means + noise * normal(*means.shape)
    # Tokens scatter around their text, along a few directions of the text's own.
    spread = [noise * normal(tokens, hidden) + text for text in texts]
    neutral = shared + strength * normal(60, nuisances) @ axes + noise * normal(60, hidden)
    return Planted(made_of(entries), directions, texts, spread, neutral)
