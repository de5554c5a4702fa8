"""Extraction: methods by name, and what holds for the directions of every one of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..artefacts import provenance
from ..capture import Activations
from ..corpus import Corpus
from ..errors import AmygdalaError
from .directions import Directions

TextActivations = Float[Tensor, "texts hidden"]
TokenActivations = list[Float[Tensor, "tokens hidden"]]


class Spectral(NamedTuple):
    """What a method returns that has eigenvalues to show for its vectors."""

    vectors: Float[Tensor, "concepts hidden"]
    eigenvalues: Float[Tensor, "concepts n"]


Function = Callable[..., Float[Tensor, "concepts hidden"] | Spectral]
"""(activations of `corpus.texts` at one layer, corpus, **options) -> one row per
`corpus.concepts`, of any length; a row of zeros says that there is nothing to go by."""


@dataclass(frozen=True)
class Method:
    """A registered method, and whether it reads every token of a text or one vector per text."""

    function: Function
    reads_tokens: bool

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


methods: dict[str, Method] = {}
"""Every registered extraction method by name."""


def method(name: str, *, reads_tokens: bool = False) -> Callable[[Function], Function]:
    """Register an extraction method, so that `extract(..., method=name)` finds it.

    >>> @method("mean_only")
    ... def mean_only(acts, corpus):
    ...     return torch.stack([acts[corpus.positives(c)].mean(0) for c in corpus.concepts])

    Keyword-only parameters are its options: `extract` takes them, and provenance records them. One
    that is given as Activations arrives as what these hold at the layer in hand.
    """

    def register(function: Function) -> Function:
        methods[name] = Method(function, reads_tokens)
        return function

    return register


def extract(
    acts: Activations, corpus: Corpus, method: str = "pooled", **options: Any
) -> Directions:
    """One unit vector per concept of `corpus` and layer of `acts`, by a registered `method`.

    `acts` must hold exactly the texts of `corpus`, as `capture(lm, corpus)` does; `subspace` wants
    them with pool="tokens". `options` are the method's own; `centred` needs
    `neutral=capture(lm, corpus.neutral, ...)`.

    Texts with activations that are not finite are left out, and so are concepts that a method finds
    no direction for; a warning names them. Raises AmygdalaError for an unknown method or option,
    other texts, another pool than the method reads, or if no concept is left.
    """
    chosen = find_method(method, acts, options)
    if acts.texts != corpus.texts:
        missing = len(set(corpus.texts) - set(acts.texts))
        raise AmygdalaError(
            f"the activations are of other texts than the corpus ({missing} of its "
            f"{len(corpus.texts)} texts are missing): run capture(lm, corpus) on this very corpus"
        )
    acts, corpus = _finite(acts, corpus)
    found = {}
    for layer in acts.layers:
        here = {k: v[layer] if isinstance(v, Activations) else v for k, v in options.items()}
        raw = chosen.function(_float(acts[layer]), corpus, **here)
        found[layer] = raw if isinstance(raw, Spectral) else Spectral(raw, None)
        shape = (len(corpus.concepts), text_means(acts, layer).shape[1])
        if found[layer].vectors.shape != shape:
            raise AmygdalaError(
                f"{method} gave {tuple(found[layer].vectors.shape)}, not (concepts, hidden), which "
                f"is {shape} here"
            )
    kept = _with_direction({n: at.vectors for n, at in found.items()}, corpus.concepts, method)
    vectors = {n: torch.nn.functional.normalize(at.vectors[kept]) for n, at in found.items()}
    projections = {n: text_means(acts, n) @ vectors[n].T for n in acts.layers}
    return Directions(
        concepts=[corpus.concepts[row] for row in kept],
        vectors=vectors,
        residual_norms=dict(acts.residual_norms),
        means={n: values.mean(0) for n, values in projections.items()},
        stds={n: values.std(0) for n, values in projections.items()},
        provenance=provenance(
            model=acts.model_name,
            revision=acts.model_revision,
            weight_hash=acts.model_hash,
            n_layers=acts.n_layers,
            corpus_hash=corpus.hash,
            method=method,
            parameters=recorded_options(chosen, options),
            pool=acts.pool,
            skip=acts.skip,
            chat_template=acts.chat_template,
        ),
        eigenvalues={
            n: at.eigenvalues[kept] for n, at in found.items() if at.eigenvalues is not None
        },
    )


def text_means(acts: Activations, layer: int) -> TextActivations:
    """One vector per text: as it was pooled, or the mean of its tokens."""
    held = acts[layer]
    return (
        torch.stack([t.float().mean(0) for t in held]) if isinstance(held, list) else held.float()
    )


def find_method(name: str, acts: Activations, options: dict[str, Any]) -> Method:
    """The method; raises AmygdalaError with all that is wrong with how it is asked for."""
    if name not in methods:
        raise AmygdalaError(f"no method {name!r}: choose one of {', '.join(sorted(methods))}")
    chosen, problems = methods[name], []
    if chosen.reads_tokens and acts.pool != "tokens":
        problems.append(f"{name} reads every token of a text: capture with pool='tokens'")
    if not chosen.reads_tokens and acts.pool == "tokens":
        problems.append(f"{name} reads one vector per text: capture with pool='last' or 'mean'")
    if unknown := sorted(set(options) - set(chosen.options)):
        known = ", ".join(chosen.options) or "none"
        problems.append(f"{name} has no option {', '.join(unknown)} (options: {known})")
    for option, parameter in chosen.options.items():
        if option not in options and parameter.default is parameter.empty:
            problems.append(
                f"{name} needs {option}: say "
                f"extract(..., {option}=capture(lm, corpus.{option}, layers, pool={acts.pool!r}))"
            )
    for option, given in options.items():
        if isinstance(given, Activations):
            same = given.model_hash, given.pool, given.site, set(acts.layers) - set(given.layers)
            if same != (acts.model_hash, acts.pool, acts.site, set()):
                problems.append(
                    f"{option} was captured from other weights, or with another pool or at other "
                    f"layers than the texts: capture it with layers={acts.layers}, "
                    f"pool={acts.pool!r}"
                )
    if problems:
        raise AmygdalaError("\n".join(problems))
    return chosen


def _float(held: Tensor | list[Tensor]) -> TextActivations | TokenActivations:
    return [t.float() for t in held] if isinstance(held, list) else held.float()


def recorded_options(chosen: Method, options: dict[str, Any]) -> dict[str, Any]:
    """The method's options as JSON: defaults too, and activations by how many texts they are of."""
    values = {name: options.get(name, p.default) for name, p in chosen.options.items()}
    return {
        name: f"{len(value.texts)} texts" if isinstance(value, Activations) else value
        for name, value in values.items()
    }


def _finite(acts: Activations, corpus: Corpus) -> tuple[Activations, Corpus]:
    """Both without the texts that have a NaN or an infinity at any layer."""
    sound = torch.stack([text_means(acts, n).isfinite().all(1) for n in acts.layers]).all(0)
    if sound.all():
        return acts, corpus
    kept = [text for text, fine in zip(acts.texts, sound, strict=True) if fine]
    lost = [text for text, fine in zip(acts.texts, sound, strict=True) if not fine]
    labels = {e.text: e.concept or "no concept" for e in corpus.entries}
    named = "; ".join(f"{labels[text]}: {text[:40]!r}" for text in lost[:5])
    warnings.warn(
        f"left out {len(lost)} texts whose activations are not finite ({named}"
        f"{'; ...' if len(lost) > 5 else ''}): load the model with a wider dtype",
        stacklevel=3,
    )
    return acts.select(kept), corpus.only(kept)


def _with_direction(
    raw: dict[int, Float[Tensor, "concepts hidden"]], concepts: Sequence[str], method: str
) -> list[int]:
    """Rows that have a direction at every layer; the others are named in a warning."""
    sound = {n: (rows.norm(dim=1) > 0) & rows.isfinite().all(1) for n, rows in raw.items()}
    everywhere = torch.stack(list(sound.values())).all(0)
    lost = [c for c, fine in zip(concepts, everywhere, strict=True) if not fine]
    if lost:
        where = ", ".join(str(n) for n, fine in sound.items() if not fine.all())
        shown = ", ".join(lost[:20]) + (f" and {len(lost) - 20} more" if len(lost) > 20 else "")
        message = (
            f"no direction at layer {where} for {shown}: {method} finds no difference between "
            "their texts and the others there (the embedding of the last token is the same full "
            "stop everywhere: use pool='mean' for layer -1; `paired` needs paired texts)"
        )
        if len(lost) == len(concepts):
            raise AmygdalaError(message)
        warnings.warn(message, stacklevel=3)
    return [row for row, fine in enumerate(everywhere) if fine]
