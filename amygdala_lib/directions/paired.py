"""`paired`: how a concept's framing of a scenario differs from the scenario's other framings."""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Float
from torch import Tensor

from ..corpus import Corpus
from .extraction import method


@method("paired")
def paired(acts: Float[Tensor, "texts hidden"], corpus: Corpus) -> Float[Tensor, "concepts hidden"]:
    """A framing minus the mean of its scenario's framings, averaged over scenarios, then centred.

    Only paired texts are read; the baseline is no framing. Version k of every framing tells the
    same content, so differences are taken within a version. Concepts without a framing get zeros.

    Source: Wang et al., arXiv 2510.11328.
    """
    row_of = {text: row for row, text in enumerate(corpus.texts)}
    tellings: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
    for entry in corpus.entries:
        if entry.kind == "paired" and entry.concept is not None:
            tellings[entry.scenario, entry.version][entry.concept] = row_of[entry.text]
    differences: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for (scenario, _), framings in tellings.items():
        shared = acts[list(framings.values())].mean(0)
        for concept, row in framings.items():
            differences[concept][scenario].append(acts[row] - shared)

    found = torch.zeros(len(corpus.concepts), acts.shape[1], dtype=acts.dtype, device=acts.device)
    framed = [row for row, concept in enumerate(corpus.concepts) if concept in differences]
    for row in framed:
        by_scenario = differences[corpus.concepts[row]].values()
        found[row] = torch.stack([torch.stack(d).mean(0) for d in by_scenario]).mean(0)
    found[framed] -= found[framed].mean(0)
    return found
