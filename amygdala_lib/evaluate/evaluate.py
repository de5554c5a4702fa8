"""Every method at every layer, on every split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..artefacts import provenance
from ..capture import Activations
from ..corpus import Corpus
from ..corpus_files import did_you_mean
from ..directions import methods, text_means
from ..directions.extraction import find_method, recorded_options
from ..errors import AmygdalaError
from ..models import EMBEDDING
from . import figures
from .baselines import Words, random_aurocs, random_directions, shuffled_aurocs
from .evaluation import TABLES, Evaluation
from .hard import HardNegatives
from .recognition import ACCURACIES, accuracies, cluster_names, clusters_of, confusion, mistaken
from .scores import Reader, one_vector_per_text
from .splits import SPLITS, Part, Split, make_splits
from .stability import Redraws

SIGNIFICANT = 0.05


def evaluate(
    acts: Activations,
    corpus: Corpus,
    method: str | Sequence[str] = "pooled",
    *,
    splits: Iterable[str] = SPLITS,
    folds: int = 5,
    draws: int = 1000,
    repeats: int = 3,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Evaluation:
    """How well directions tell a concept's texts from others that they were not made of.

    `acts` are of `corpus.all_texts`, as from `capture(lm, corpus.all_texts, layers)`; with layer -1
    among the layers the embeddings stand beside every figure. For methods that read tokens capture
    with pool="tokens"; the others then read the mean of the tokens. `options` go to the methods
    that have them (`neutral` to `centred`).

    Splits: `heldout` extracts from all training texts and tries `corpus.heldout`; `text` does so in
    `folds` stratified folds of the training texts; `scenario` in folds of paired scenarios, each
    kept whole. Nothing is computed from texts that are tried but their own scores, in standard
    deviations of the training texts. Scores of all folds are then ranked together.

    `draws` is the number of random directions and of bootstrap samples. `repeats` is how often
    directions are extracted anew for each of: halves, bootstraps and, per split, shuffled labels;
    with 0 there is no stability and no such null, for 11 extractions instead of 29 at a layer.

    Raises AmygdalaError, before anything is extracted, for unknown methods, options or splits,
    texts without (finite) activations, or a corpus that can give none of the splits.
    """
    names = [method] if isinstance(method, str) else list(dict.fromkeys(method))
    splits = (splits,) if isinstance(splits, str) else tuple(dict.fromkeys(splits))
    numbers = {"folds": (folds, 2), "draws": (draws, 1), "repeats": (repeats, 0)}
    problems = _wrong_arguments(names, splits, numbers, options)
    problems += _wrong_texts(acts, corpus)
    pooled = {k: _pooled(value) for k, value in options.items()}
    means = one_vector_per_text(acts)
    own: dict[str, dict[str, Any]] = {}
    for name in (name for name in names if name in methods):
        given = options if methods[name].reads_tokens else pooled
        own[name] = {k: v for k, v in given.items() if k in methods[name].options}
        read = acts if methods[name].reads_tokens else means
        problems += _wrong_for(name, read, own[name])
    made, left_out = [], {}
    if not problems:
        made, left_out = make_splits(corpus, splits, folds, seed)
        if not made:
            why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
            problems.append(f"this corpus can give none of the splits asked for ({why})")
    if problems:
        raise AmygdalaError("\n".join(problems))

    run = _Run(_in_order(acts, corpus.all_texts), corpus, made, draws, repeats, seed)
    steps = [(layer, name) for layer in acts.layers for name in names]
    for layer, name in tqdm(steps, desc="evaluating", unit="step", disable=not progress):
        run.step(layer, name, own[name])
    origin = provenance(
        model=acts.model_name,
        revision=acts.model_revision,
        weight_hash=acts.model_hash,
        n_layers=acts.n_layers,
        corpus_hash=corpus.hash,
        methods={name: recorded_options(methods[name], own[name]) for name in names},
        layers=acts.layers,
        pool=acts.pool,
        skip=acts.skip,
        chat_template=acts.chat_template,
        folds=folds,
        draws=draws,
        repeats=repeats,
        seed=seed,
    )
    return run.evaluation(names, left_out, origin)


class _Run:
    """What steps share, and the rows that they have found so far."""

    def __init__(
        self,
        acts: Activations,
        corpus: Corpus,
        splits: list[Split],
        draws: int,
        repeats: int,
        seed: int,
    ) -> None:
        self.acts, self.corpus, self.splits = acts, corpus, splits
        self.draws, self.repeats, self.seed = draws, repeats, seed
        self.texts, self.concepts = corpus.all_texts, corpus.concepts
        self.everything = Part.of(corpus, np.arange(len(corpus.texts)))
        self.clusters = clusters_of(corpus)
        self.redraws = Redraws.of(corpus, repeats, seed)
        self.rows: dict[str, list[dict[str, Any] | pd.DataFrame]] = {name: [] for name in TABLES}
        self.layer: int | None = None

        heldout = [split for split in splits if split.name == "heldout"]
        self.hard = HardNegatives(corpus, heldout[0]) if heldout else None
        words = Words(self.texts, self.concepts)
        self.words_aurocs, self.words_summary = {}, {}
        for split in splits:
            scores = words.try_on(split)
            aurocs = figures.auroc(scores, split.positive)
            self.words_aurocs[split.name] = aurocs
            self.words_summary[split.name] = _middle(aurocs) | accuracies(
                scores, split.positive, self.clusters
            )
        self.words_hard = {}
        if self.hard and self.hard.kinds:
            every = np.arange(len(self.texts))
            scores = words.score(self.everything, every)
            self.words_hard = {row["kind"]: row["auroc"] for row in self._hard(scores)}

    def step(self, layer: int, method: str, options: dict[str, Any]) -> None:
        """All figures of one method at one layer."""
        if layer != self.layer:
            self._move_to(layer)
        reader = Reader.at(layer, method, self.acts, self.values, self.concepts, options)
        here = {"method": method, "layer": layer}
        vectors = reader.fit(self.everything)
        for split in self.splits:
            scores = reader.try_on(split, self.everything, vectors)
            self._figures(scores, split, here | {"split": split.name})
            if self.repeats:
                aurocs = shuffled_aurocs(reader, split, self.repeats, self.seed)
                self._null("shuffled labels", aurocs, here | {"split": split.name})
        if self.hard and self.hard.kinds:
            scores = reader.score(vectors, self.everything, np.arange(len(self.texts)))
            for row in self._hard(scores):
                beside = {"words_auroc": self.words_hard.get(row["kind"], np.nan)}
                self.rows["hard"].append(here | row | beside)
        if self.repeats:
            cosines = self.redraws.cosines(reader, vectors)
            counts = {"n_positives": [len(self.corpus.positives(c)) for c in self.concepts]}
            frame = pd.DataFrame({"concept": self.concepts} | counts | cosines)
            self.rows["stability"].append(_labelled(frame, here))

    def evaluation(
        self, names: list[str], left_out: dict[str, str], origin: dict[str, Any]
    ) -> Evaluation:
        tables = {name: _joined(rows, TABLES[name]) for name, rows in self.rows.items()}
        mistaken_for = tables["mistaken"]
        shown = sorted({number for held in mistaken_for.get("examples", []) for number in held})
        tables["concepts"] = _beside_embedding(tables["concepts"], ["auroc"], ["concept", "split"])
        measured = ["median_auroc", "mean_auroc", *ACCURACIES]
        tables["summary"] = _beside_embedding(tables["summary"], measured, ["split"])
        if len(tables["hard"]):
            tables["hard"] = _beside_embedding(tables["hard"], ["auroc"], ["kind"])
        return Evaluation(
            **{name: _in_turn(table, names) for name, table in tables.items()},
            texts={number: self.texts[number] for number in shown},
            left_out=left_out,
            provenance=origin,
        )

    def _move_to(self, layer: int) -> None:
        """Random directions are drawn once per layer and ranked once per split."""
        self.layer, self.values = layer, text_means(self.acts, layer)
        training = self.values[: len(self.corpus.texts)]
        directions = random_directions(training, self.draws, self.seed)
        self.random = {}
        for split in self.splits:
            found = random_aurocs(self.values, directions, split)
            self.random[split.name] = found
            here = {"method": "any", "layer": layer, "split": split.name}
            self._null("random directions", found, here)

    def _figures(self, scores: np.ndarray, split: Split, here: dict[str, Any]) -> None:
        counted = ~np.isnan(scores)
        n_positives, n_texts = (split.positive & counted).sum(0), counted.sum(0)
        aurocs = figures.auroc(scores, split.positive)
        low, high = figures.auroc_intervals(
            scores, split.positive, draws=self.draws, seed=self.seed
        )
        p = figures.p_against_random(aurocs, self.random[split.name])
        tested = figures.moderated(aurocs) if split.cross_validated else aurocs
        p_permutation = figures.p_of_labels(tested, n_positives, n_texts)
        # Better than chance is what beats both: a random direction, and random labels. In cross-
        # validation only the second allows for texts that score one another.
        p_adjusted = figures.adjusted(np.maximum(p, p_permutation))
        found = pd.DataFrame(
            {
                "concept": self.concepts,
                "n_positives": n_positives,
                "n_texts": n_texts,
                "auroc": aurocs,
                "auroc_low": low,
                "auroc_high": high,
                "average_precision": figures.average_precision(scores, split.positive),
                "p": p,
                "p_permutation": p_permutation,
                "p_adjusted": p_adjusted,
                "significant": p_adjusted < SIGNIFICANT,
                "words_auroc": self.words_aurocs[split.name],
            }
        )
        self.rows["concepts"].append(_labelled(found, here))

        counts = {"n_concepts": int((~np.isnan(aurocs)).sum()), "n_texts": len(scores)}
        middle = _middle(aurocs)
        for name, statistic in (("median", np.median), ("mean", np.mean)):
            ends = figures.over_concepts(aurocs, statistic, draws=self.draws, seed=self.seed)
            middle |= dict(zip((f"{name}_low", f"{name}_high"), ends, strict=True))
        judged = p_adjusted[~np.isnan(p_adjusted)] < SIGNIFICANT
        beside = {
            f"words_{name}": self.words_summary[split.name][name]
            for name in ("median_auroc", "mean_auroc", *ACCURACIES)
        }
        self.rows["summary"].append(
            here
            | counts
            | middle
            | accuracies(scores, split.positive, self.clusters)
            | {"significant": float(judged.mean()) if len(judged) else np.nan}
            | beside
        )
        for row in mistaken(scores, split.positive, split.rows, self.concepts):
            self.rows["mistaken"].append(here | row)
        if self.clusters is not None:
            names = cluster_names(self.corpus)
            taken = confusion(scores, split.positive, self.clusters)
            for own, other in zip(*taken.nonzero(), strict=True):
                row = {"cluster": names[own], "taken_for": names[other]}
                self.rows["clusters"].append(here | row | {"n_texts": int(taken[own, other])})

    def _hard(self, scores: np.ndarray) -> list[dict[str, Any]]:
        return self.hard.figures(scores, draws=self.draws, seed=self.seed)

    def _null(self, kind: str, aurocs: np.ndarray, here: dict[str, Any]) -> None:
        """`low` and `high` hold 95% of draws' means; of a few draws, the mean's normal interval.

        `single_low` and `single_high` hold 95% of the AUROCs of one direction for one concept.
        """
        single = aurocs[~np.isnan(aurocs)]
        if not len(single):
            return
        mean = float(single.mean())
        if kind == "random directions":
            low, high = np.quantile(aurocs[:, ~np.isnan(aurocs).all(0)].mean(1), [0.025, 0.975])
        else:
            half = 1.96 * single.std() / np.sqrt(len(single))
            low, high = mean - half, mean + half
        single_low, single_high = np.quantile(single, [0.025, 0.975])
        row = {"draws": len(aurocs), "mean": mean, "low": float(low), "high": float(high)}
        row |= {"single_low": float(single_low), "single_high": float(single_high)}
        self.rows["nulls"].append({"kind": kind} | here | row)


def _middle(aurocs: np.ndarray) -> dict[str, float]:
    found = aurocs[~np.isnan(aurocs)]
    if not len(found):
        return {"median_auroc": np.nan, "mean_auroc": np.nan}
    return {"median_auroc": float(np.median(found)), "mean_auroc": float(found.mean())}


def _labelled(frame: pd.DataFrame, here: dict[str, Any]) -> pd.DataFrame:
    for place, (name, value) in enumerate(here.items()):
        frame.insert(place, name, value)
    return frame


def _joined(rows: list[Any], columns: list[str]) -> pd.DataFrame:
    if not rows:
        return pd.DataFrame({name: [] for name in columns})
    if isinstance(rows[0], pd.DataFrame):
        return pd.concat(rows, ignore_index=True)
    return pd.DataFrame(rows)


def _beside_embedding(table: pd.DataFrame, measured: list[str], keys: list[str]) -> pd.DataFrame:
    """The same figures of the same method at layer -1, as further columns; NaN without it."""
    keys = ["method", *keys]
    embedding = table.loc[table["layer"] == EMBEDDING, [*keys, *measured]]
    renamed = embedding.rename(columns={name: f"embedding_{name}" for name in measured})
    return table.merge(renamed, on=keys, how="left", validate="many_to_one")


def _in_turn(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Methods in the order they were asked for, each from its first layer to its last."""
    if "method" not in table or not len(table):
        return table
    place = {name: number for number, name in enumerate(names)}
    order = table["method"].map(lambda name: place.get(name, -1))
    return table.loc[order.sort_values(kind="stable").index].reset_index(drop=True)


def _pooled(option: Any) -> Any:
    return one_vector_per_text(option) if isinstance(option, Activations) else option


def _in_order(acts: Activations, texts: list[str]) -> Activations:
    """The activations of these texts in this order."""
    if acts.texts == texts:
        return acts
    row_of = {text: row for row, text in enumerate(acts.texts)}
    rows = [row_of[text] for text in texts]
    by_layer = {
        layer: [held[row] for row in rows] if isinstance(held, list) else held[rows]
        for layer in acts.layers
        for held in [acts[layer]]
    }
    tokens = acts.tokens and [acts.tokens[row] for row in rows]
    return replace(acts, texts=texts, tokens=tokens, _by_layer=by_layer)


def _wrong_arguments(
    names: list[str],
    splits: tuple[str, ...],
    numbers: dict[str, tuple[int, int]],
    options: dict[str, Any],
) -> list[str]:
    problems = []
    if not names:
        problems.append(f"no method to evaluate: choose some of {', '.join(sorted(methods))}")
    for name in names:
        if name not in methods:
            hint = did_you_mean(name, methods)
            problems.append(f"no method {name!r}{hint}: there are {', '.join(sorted(methods))}")
    if not splits:
        problems.append(f"no split to evaluate: choose some of {', '.join(SPLITS)}")
    for name in splits:
        if name not in SPLITS:
            hint = did_you_mean(name, SPLITS)
            problems.append(f"no split {name!r}{hint}: there are {', '.join(SPLITS)}")
    for name, (value, least) in numbers.items():
        if not isinstance(value, int) or value < least:
            problems.append(f"{name} is {value!r}: give a whole number from {least}")
    known = {option for name in names if name in methods for option in methods[name].options}
    if unknown := sorted(set(options) - known):
        problems.append(
            f"none of the methods has an option {', '.join(unknown)} "
            f"(options: {', '.join(sorted(known)) or 'none'})"
        )
    return problems


def _wrong_texts(acts: Activations, corpus: Corpus) -> list[str]:
    known = Counter(acts.texts)
    missing = [text for text in corpus.all_texts if text not in known]
    if missing:
        return [
            f"{len(missing)} of the corpus' {len(corpus.all_texts)} texts have no activations "
            f"(the first is {missing[0][:40]!r}): say capture(lm, corpus.all_texts, layers)"
        ]
    wild = {
        acts.texts[row]
        for layer in acts.layers
        for row in np.flatnonzero(~text_means(acts, layer).isfinite().all(1).numpy())
    } & set(corpus.all_texts)
    if wild:
        return [
            f"{len(wild)} texts have activations that are not finite ({min(wild)[:40]!r}): load "
            "the model with a wider dtype"
        ]
    return []


def _wrong_for(name: str, acts: Activations, options: dict[str, Any]) -> list[str]:
    """What `extract` would say of this method and these options."""
    try:
        find_method(name, acts, options)
    except AmygdalaError as error:
        return str(error).split("\n")
    return []
