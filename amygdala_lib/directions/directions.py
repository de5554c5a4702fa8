"""Directions: what every method returns, how methods are registered, and the file format."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..artefacts import as_json, provenance, read_json, read_tensors, replacing, write_tensors
from ..capture import Activations
from ..corpus import Corpus
from ..errors import AmygdalaError, ArtefactError

Method = Callable[[Float[Tensor, "texts hidden"], Corpus], Float[Tensor, "concepts hidden"]]
"""Activations of `corpus.texts` at one layer -> one row per `corpus.concepts`, of any length."""

methods: dict[str, Method] = {}
"""Every registered extraction method by name."""


def method(name: str) -> Callable[[Method], Method]:
    """Register an extraction method, so that `extract(..., method=name)` finds it.

    >>> @method("mean_only")
    ... def mean_only(acts, corpus):
    ...     return torch.stack([acts[corpus.positives(c)].mean(0) for c in corpus.concepts])
    """

    def register(function: Method) -> Method:
        methods[name] = function
        return function

    return register


@dataclass(frozen=True, eq=False)
class Directions:
    """A unit vector per concept and layer.

    `vectors[layer]` is (n_concepts, hidden) float32, rows in the order of `concepts`.
    `residual_norms[layer]` is the layer's mean residual norm, the unit of steering strength.
    `means[layer]` and `stds[layer]`, (n_concepts,), are of the texts' projections, for z-scores.
    """

    concepts: list[str]
    vectors: dict[int, Float[Tensor, "concepts hidden"]]
    residual_norms: dict[int, float]
    means: dict[int, Float[Tensor, " concepts"]]
    stds: dict[int, Float[Tensor, " concepts"]]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return sorted(self.vectors)

    @property
    def hidden_size(self) -> int:
        return self.vectors[self.layers[0]].shape[1]

    def index(self, concept: str) -> int:
        """The row of a concept. Raises AmygdalaError if it has no direction."""
        if concept not in self.concepts:
            raise AmygdalaError(
                f"no direction for {concept!r}: there are {', '.join(self.concepts)}"
            )
        return self.concepts.index(concept)

    def similarity(self, layer: int) -> Float[Tensor, "concepts concepts"]:
        """Cosines between all pairs of concepts at one layer."""
        return self.vectors[layer] @ self.vectors[layer].T

    def save(self, folder: Path | str, **facts: Any) -> Path:
        """Write `readout.safetensors` and `readout.json` into `folder`, which is made if need be.

        `facts` (a notebook's name, say) join the provenance. Returns the folder. Raises
        ArtefactError for a fact that JSON cannot hold; what was there before is then left alone.
        """
        folder = Path(folder)
        tensors = {}
        for layer in self.layers:
            tensors[f"layer_{layer}.vectors"] = self.vectors[layer]
            tensors[f"layer_{layer}.mean"] = self.means[layer]
            tensors[f"layer_{layer}.std"] = self.stds[layer]
        written_by = ("format_version", "versions")
        origin = {k: v for k, v in self.provenance.items() if k not in written_by}
        description = {
            "concepts": self.concepts,
            "layers": self.layers,
            "hidden_size": self.hidden_size,
            "dtype": "float32",
            "residual_norms": {str(layer): norm for layer, norm in self.residual_norms.items()},
            **provenance(**origin),
            **facts,
        }
        with replacing(folder / "readout.json") as temporary:
            temporary.write_text(as_json(description), encoding="utf-8")
            # The names again, so that vectors never go by the names of another run.
            names = {"concepts": json.dumps(self.concepts)}
            write_tensors(folder / "readout.safetensors", tensors, names)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Directions:
        """Read what `save` wrote; see `Readout.load` for how little is enough.

        Raises ArtefactError if a file is missing, damaged or does not fit the other.
        """
        folder = Path(folder)
        made_by = "`amy.extract(...).save(folder)` (notebook 02)"
        description = read_json(folder / "readout.json", made_by)
        tensors, names = read_tensors(folder / "readout.safetensors", made_by)
        lacking = [k for k in ("concepts", "layers", "hidden_size") if k not in description]
        layers = description.get("layers", [])
        lacking += [key for n in layers if (key := f"layer_{n}.vectors") not in tensors]
        if lacking:
            raise ArtefactError(
                f"{folder} lacks {', '.join(lacking)}: write it again with {made_by}"
            )
        concepts = description["concepts"]
        shape = (len(concepts), description["hidden_size"])
        vectors = {layer: tensors[f"layer_{layer}.vectors"].float() for layer in layers}
        wrong = {layer: tuple(v.shape) for layer, v in vectors.items() if tuple(v.shape) != shape}
        if wrong or json.loads(names.get("concepts", "null")) not in (None, concepts):
            raise ArtefactError(
                f"{folder}: readout.json says {shape} per layer for {', '.join(concepts)}, but the "
                f"tensors are {wrong or 'of other concepts'}: the two files are not from one run; "
                f"write them again with {made_by}"
            )
        known = {"concepts", "layers", "hidden_size", "dtype", "residual_norms"}
        return cls(
            concepts=concepts,
            vectors=vectors,
            residual_norms={int(k): v for k, v in description.get("residual_norms", {}).items()},
            means={k: tensors.get(f"layer_{k}.mean", torch.zeros(shape[0])) for k in layers},
            stds={k: tensors.get(f"layer_{k}.std", torch.ones(shape[0])) for k in layers},
            provenance={k: v for k, v in description.items() if k not in known},
        )


def extract(acts: Activations, corpus: Corpus, method: str = "pooled") -> Directions:
    """One unit vector per concept of `corpus` and layer of `acts`.

    `acts` must hold exactly the texts of `corpus`, as `capture(lm, corpus)` does. Raises
    AmygdalaError for an unknown method, other texts, or a concept whose direction is zero.
    """
    if method not in methods:
        raise AmygdalaError(f"no method {method!r}: choose one of {', '.join(sorted(methods))}")
    if acts.texts != corpus.texts:
        missing = len(set(corpus.texts) - set(acts.texts))
        raise AmygdalaError(
            f"the activations are of other texts than the corpus ({missing} of its "
            f"{len(corpus.texts)} texts are missing): run capture(lm, corpus) on this very corpus"
        )
    if acts.pool == "tokens":
        raise AmygdalaError(
            f"{method} reads one vector per text: capture with pool='last' or 'mean'"
        )
    vectors, means, stds = {}, {}, {}
    for layer in acts.layers:
        raw = methods[method](acts[layer].float(), corpus)
        if raw.shape != (shape := (len(corpus.concepts), acts[layer].shape[1])):
            raise AmygdalaError(
                f"{method} gave {tuple(raw.shape)}, not (concepts, hidden), which is {shape} here"
            )
        lengths = raw.norm(dim=1, keepdim=True)
        _refuse_nothing(lengths[:, 0], corpus.concepts, layer)
        vectors[layer] = raw / lengths
        projections = acts[layer].float() @ vectors[layer].T
        means[layer], stds[layer] = projections.mean(0), projections.std(0)
    return Directions(
        concepts=list(corpus.concepts),
        vectors=vectors,
        residual_norms=dict(acts.residual_norms),
        means=means,
        stds=stds,
        provenance=provenance(
            model=acts.model_name,
            revision=acts.model_revision,
            weight_hash=acts.model_hash,
            n_layers=acts.n_layers,
            corpus_hash=corpus.hash,
            method=method,
            pool=acts.pool,
            skip=acts.skip,
            chat_template=acts.chat_template,
        ),
    )


def _refuse_nothing(
    lengths: Float[Tensor, " concepts"], concepts: Sequence[str], layer: int
) -> None:
    nothing = [c for c, length in zip(concepts, lengths, strict=True) if not length > 0]
    if nothing:
        raise AmygdalaError(
            f"no direction at layer {layer} for {', '.join(nothing)}: their texts do not differ "
            "there from the others (the embedding of the last token is the same full stop "
            "everywhere: use pool='mean' for layer -1)"
        )
