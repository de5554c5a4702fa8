"""The quality report: every figure for every concept and layer, and what to do about it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ..artefacts import provenance, read_json, write_json
from ..capture import Activations, capture
from ..components import find_output, layers_with
from ..corpus import Corpus
from ..directions import Directions, membership, text_means
from ..errors import AmygdalaError, ArtefactError
from ..models import LanguageModel, depth_label
from ..spectrum import first_pc_ratio
from .geometry import combinations, nearest, neighbour_r2
from .heads import head_differences, head_effects
from .neurons import neuron_contributions, neuron_cosines
from .texts import RELIABLE, agreement, alignment

REDUNDANT, SINGLE_NEURON, UNRELIABLE = 0.9, 0.6, 0.5
TOP_HEADS, TOP_NEURONS, TOP_CONCEPTS, WORST_TEXTS = 10, 5, 5, 2
BUCKETS = {
    "clean": "trust these",
    "needs-texts": f"as few texts would come out differently; write up to {RELIABLE:g} reliability",
    "fragmented": "their texts agree no more than random ones: unseen by the model, or several",
    "redundant": f"five others explain over {REDUNDANT:.0%} of each: merge, or find what differs",
    "single-neuron": f"cosine with one neuron above {SINGLE_NEURON:g}: read that neuron instead",
}


@dataclass(frozen=True, eq=False)
class QualityReport:
    """`figures[concept][layer]` has all that was measured; the methods show it.

    `skipped` says, per layer, what could not be looked into (routed experts, say).
    """

    figures: dict[str, dict[int, dict[str, Any]]]
    n_layers: int
    skipped: dict[int, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return list(next(iter(self.figures.values())))

    def to_frame(self) -> pd.DataFrame:
        """One row per concept and layer, one column per figure; NaN where none was measured."""
        rows = {
            (concept, layer): _flat(found)
            for concept, by_layer in self.figures.items()
            for layer, found in by_layer.items()
        }
        frame = pd.DataFrame.from_dict(rows, orient="index")
        frame.index = pd.MultiIndex.from_tuples(frame.index, names=["concept", "layer"])
        return frame

    def triage(self, layer: int | None = None) -> str:
        """Which concepts to trust at a layer and what to do about the others, on one screen.

        `layer` defaults to the one nearest two thirds of depth. Raises AmygdalaError for a layer
        that is not in the report.
        """
        if layer is None:
            layer = min(self.layers, key=lambda n: abs(n + 1 - 2 * self.n_layers / 3))
        if layer not in self.layers:
            raise AmygdalaError(f"no layer {layer} in this report: there are {self.layers}")
        frame = self.to_frame().xs(layer, level="layer")
        lines = [f"{depth_label(layer, self.n_layers)}, {len(frame)} concepts"]
        if layer in self.skipped:
            lines.append(f"not looked into: {self.skipped[layer]}")
        for bucket, advice in BUCKETS.items():
            found = frame[frame["bucket"] == bucket].sort_values("reliability")
            lines += ["", f"{bucket}: {len(found)} ({advice})"]
            if bucket == "clean" and len(found) > 30:
                weakest = ", ".join(found.index[:8])
                lines += _indented(f"least reliable among them: {weakest}")
            elif len(found):
                lines += _indented(", ".join(_named(name, row) for name, row in found.iterrows()))
        stray = frame.nsmallest(5, "worst_alignment")
        lines += ["", "texts furthest from their own direction:"]
        for concept, row in stray.iterrows():
            lines.append(f"  {row['worst_alignment']:+.2f} {concept}: {_start(row['worst_text'])}")
        return "\n".join(lines)

    def save(self, folder: Path | str, **facts: Any) -> Path:
        """Write `quality.json` into `folder`; `facts` join the provenance. Returns the path."""
        path = Path(folder) / "quality.json"
        written_by = ("format_version", "versions")
        origin = {k: v for k, v in self.provenance.items() if k not in written_by}
        content = {
            **provenance(**origin),
            **facts,
            "n_layers": self.n_layers,
            "skipped": {str(n): why for n, why in self.skipped.items()},
            "concepts": {
                concept: {str(layer): found for layer, found in by_layer.items()}
                for concept, by_layer in self.figures.items()
            },
        }
        write_json(path, content)
        return path

    @classmethod
    def load(cls, folder: Path | str) -> QualityReport:
        """Read what `save` wrote. Raises ArtefactError if it is missing or damaged."""
        path = Path(folder) / "quality.json"
        made_by = "`amygdala quality` (notebook 04)"
        content = read_json(path, made_by)
        parts = ("concepts", "n_layers", "skipped")
        if lacking := [part for part in parts if part not in content]:
            raise ArtefactError(f"{path} lacks {', '.join(lacking)}: write it again with {made_by}")
        return cls(
            figures={
                concept: {int(layer): found for layer, found in by_layer.items()}
                for concept, by_layer in content["concepts"].items()
            },
            n_layers=content["n_layers"],
            skipped={int(n): why for n, why in content["skipped"].items()},
            provenance={k: v for k, v in content.items() if k not in parts},
        )


def quality_report(
    lm: LanguageModel | None,
    acts: Activations,
    corpus: Corpus,
    dirs: Directions,
    *,
    heads: Activations | None = None,
    neurons: Activations | None = None,
    progress: bool = True,
) -> QualityReport:
    """Judge every direction of `dirs` at every layer, by its texts, neighbours, heads and neurons.

    Heads and neurons are captured from `lm`, two more passes over the texts, unless they are given
    (sites `attn_heads` and `mlp_neurons`); without `lm` they are left out. Layers without them,
    such as those of routed experts, are named in `skipped`.

    Raises AmygdalaError if activations, corpus and directions are not of one another.
    """
    _check(acts, corpus, dirs)
    layers = dirs.layers
    skipped = {n: "heads and neurons (no model was given)" for n in layers}
    if lm is not None:
        heads = heads or _captured(lm, acts, layers, "attn_heads", progress)
        neurons = neurons or _captured(lm, acts, layers, "mlp_neurons", progress)
        skipped = _skipped(layers, heads, neurons)
    rows = [corpus.concepts.index(concept) for concept in dirs.concepts]
    belongs = membership(corpus)[rows]
    texts = list(corpus.texts)
    figures: dict[str, dict[int, dict[str, Any]]] = {concept: {} for concept in dirs.concepts}
    for layer in tqdm(layers, desc="quality", unit="layer", delay=2, disable=not progress):
        found = [
            _of_texts(text_means(acts, layer), texts, belongs, dirs.vectors[layer]),
            _of_geometry(dirs.vectors[layer], dirs.concepts),
        ]
        if lm is not None and heads and layer in heads.layers:
            found.append(_of_heads(lm, heads, layer, dirs.vectors[layer], belongs))
        if lm is not None and neurons and layer in neurons.layers:
            found.append(_of_neurons(lm, neurons, layer, dirs.vectors[layer], belongs))
        for row, concept in enumerate(dirs.concepts):
            merged = {key: value for part in found for key, value in part[row].items()}
            figures[concept][layer] = merged | {"bucket": _bucket(merged)}
    return QualityReport(figures, acts.n_layers, skipped, _origin(dirs, corpus))


def _check(acts: Activations, corpus: Corpus, dirs: Directions) -> None:
    problems = []
    if acts.texts != corpus.texts:
        problems.append(
            "the activations are of other texts than the corpus: run capture(lm, corpus) on it"
        )
    if unknown := [c for c in dirs.concepts if c not in corpus.concepts]:
        problems.append(f"the corpus has no texts for {', '.join(unknown)}: use their own corpus")
    if not set(dirs.layers) <= set(acts.layers):
        problems.append(
            f"directions are at layers {dirs.layers}, activations at {acts.layers}: capture those "
            "layers too, or choose with dirs.select(layers=[...])"
        )
    if dirs.provenance.get("weight_hash", acts.model_hash) != acts.model_hash:
        problems.append("the directions were made with other weights: extract them again")
    if acts.site != "residual":
        problems.append(f"the activations are of {acts.site}: capture the residual stream")
    if len(dirs.concepts) < 2:
        problems.append("one concept has no neighbours to be judged by: extract at least two")
    if problems:
        raise AmygdalaError("\n".join(problems))


def _captured(
    lm: LanguageModel, acts: Activations, layers: list[int], site: str, progress: bool
) -> Activations | None:
    with_site = layers_with(lm, layers, site)
    if not with_site:
        return None
    return capture(
        lm,
        acts.texts,
        with_site,
        pool="mean" if acts.pool == "tokens" else acts.pool,
        site=site,
        skip=acts.skip,
        chat_template=acts.chat_template,
        progress=progress,
    )


def _skipped(
    layers: list[int], heads: Activations | None, neurons: Activations | None
) -> dict[int, str]:
    lacking = {
        layer: [
            why
            for why, site in (("heads", heads), ("neurons (routed experts?)", neurons))
            if site is None or layer not in site.layers
        ]
        for layer in layers
    }
    return {layer: " and ".join(missing) for layer, missing in lacking.items() if missing}


def _of_texts(acts, texts: list[str], belongs, vectors) -> list[dict[str, Any]]:
    agreed = agreement(acts, belongs)
    found = []
    for row, positives in enumerate(belongs):
        cosines = alignment(acts, positives, vectors[row])
        own = positives.nonzero()[:, 0].tolist()
        worst = cosines.argsort()[:WORST_TEXTS].tolist()
        found.append(
            {
                "n_texts": len(own),
                "first_pc_variance_ratio": (
                    _number(first_pc_ratio(acts[own])) if len(own) > 1 else None
                ),
                "agreement": _number(agreed.cosine[row]),
                "agreement_by_chance": _number(agreed.by_chance[row]),
                "reliability": _number(agreed.reliability[row]),
                "texts_wanted": _number(agreed.wanted[row]),
                "alignment": {
                    "mean": _number(cosines.mean()),
                    "each": [_number(c) for c in cosines],
                    "worst": [
                        {"cosine": _number(cosines[k]), "text": texts[own[k]]} for k in worst
                    ],
                },
            }
        )
    return found


def _of_geometry(vectors, concepts: list[str]) -> list[dict[str, Any]]:
    rows, cosines = nearest(vectors, TOP_CONCEPTS)
    r2, weights = combinations(vectors)
    few_r2 = neighbour_r2(vectors, rows)
    largest = weights.abs().topk(min(TOP_CONCEPTS, len(concepts) - 1), dim=1).indices
    return [
        {
            "nearest": [
                [concepts[other], _number(cosine)]
                for other, cosine in zip(rows[row].tolist(), cosines[row], strict=True)
            ],
            "neighbour_r2": _number(few_r2[row]),
            "linear_combination": {
                "r2": _number(r2[row]),
                "weights": [
                    [concepts[other], _number(weights[row, other])]
                    for other in largest[row].tolist()
                ],
            },
        }
        for row in range(len(concepts))
    ]


def _of_heads(lm, heads: Activations, layer: int, vectors, belongs) -> list[dict[str, Any]]:
    output = find_output(lm, layer, "attn_heads")
    norms, selectivity = head_differences(heads[layer], output.parts, belongs)
    effects = head_effects(heads[layer], output, vectors, belongs)
    top = norms.topk(min(TOP_HEADS, output.parts), dim=1).indices
    shares = norms.gather(1, top).sum(1) / norms.sum(1)
    return [
        {
            "heads": {"kind": output.kind, "count": output.parts},
            "per_head": [
                {
                    "head": head,
                    "norm": _number(norms[row, head]),
                    "selectivity": _number(selectivity[row, head]),
                    "effect": _number(effects[row, head]),
                }
                for head in top[row].tolist()
            ],
            # Ten of ten heads would always hold all of it.
            "head_concentration": _number(shares[row]) if output.parts > TOP_HEADS else None,
        }
        for row in range(len(vectors))
    ]


def _of_neurons(lm, neurons: Activations, layer: int, vectors, belongs) -> list[dict[str, Any]]:
    output = find_output(lm, layer, "mlp_neurons")
    cosines = neuron_cosines(output, vectors)
    contributions = neuron_contributions(neurons[layer], output, vectors, belongs)
    closest = cosines.abs().argmax(1).tolist()
    largest = contributions.abs().topk(min(TOP_NEURONS, output.parts), dim=1).indices
    return [
        {
            "best_neuron": {
                "neuron": closest[row],
                "cosine": _number(cosines[row, closest[row]]),
                "contribution": _number(contributions[row, closest[row]]),
            },
            "neurons": [
                {
                    "neuron": neuron,
                    "contribution": _number(contributions[row, neuron]),
                    "cosine": _number(cosines[row, neuron]),
                }
                for neuron in largest[row].tolist()
            ],
        }
        for row in range(len(vectors))
    ]


def _bucket(found: dict[str, Any]) -> str:
    """The first that applies: what makes the other figures meaningless comes before them."""
    if found["n_texts"] < 2:
        return "needs-texts"
    if found["agreement"] <= found["agreement_by_chance"]:
        return "fragmented"
    if found["reliability"] < UNRELIABLE:
        return "needs-texts"
    if abs(found.get("best_neuron", {}).get("cosine", 0)) > SINGLE_NEURON:
        return "single-neuron"
    if found["neighbour_r2"] > REDUNDANT:
        return "redundant"
    return "clean"


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """One row of the frame."""
    worst = found["alignment"]["worst"][0]
    return {
        "bucket": found["bucket"],
        "n_texts": found["n_texts"],
        "first_pc_ratio": _or_nan(found["first_pc_variance_ratio"]),
        "agreement": _or_nan(found["agreement"]),
        "reliability": _or_nan(found["reliability"]),
        "texts_wanted": _or_nan(found["texts_wanted"]),
        "alignment": _or_nan(found["alignment"]["mean"]),
        "worst_alignment": _or_nan(worst["cosine"]),
        "worst_text": worst["text"],
        "nearest": found["nearest"][0][0],
        "nearest_cosine": found["nearest"][0][1],
        "neighbour_r2": found["neighbour_r2"],
        "combination_r2": found["linear_combination"]["r2"],
        "best_neuron": abs(found.get("best_neuron", {}).get("cosine", np.nan)),
        "head_concentration": _or_nan(found.get("head_concentration")),
    }


def _number(value: torch.Tensor | float) -> float | None:
    """Six digits, as many as float32 holds; None for what JSON has no number for."""
    value = float(value)
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


def _named(concept: str, row: pd.Series) -> str:
    if row["bucket"] == "needs-texts":
        more = row["texts_wanted"] - row["n_texts"]
        return f"{concept} (+{np.ceil(more):.0f})" if np.isfinite(more) else concept
    if row["bucket"] == "redundant":
        return f"{concept} (~{row['nearest']})"
    return concept


def _indented(text: str, most: int = 6) -> list[str]:
    lines = textwrap.wrap(text, 98, break_on_hyphens=False)
    if len(lines) > most:
        lines = [*lines[:most], "..."]
    return [f"  {line}" for line in lines]


def _start(text: str) -> str:
    return textwrap.shorten(text, 70, placeholder=" ...")


def _origin(dirs: Directions, corpus: Corpus) -> dict[str, Any]:
    told = {name: fact for name, fact in dirs.provenance.items() if name != "n_layers"}
    return told | {"corpus_hash": corpus.hash}
