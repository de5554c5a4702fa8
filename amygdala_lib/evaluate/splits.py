"""Splits: which texts directions are extracted from, and which they are tried on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from ..corpus import Corpus, Text

SPLITS = ("heldout", "text", "scenario")
Rows = Int[np.ndarray, " texts"]


@dataclass(frozen=True, eq=False)
class Part:
    """Texts to extract directions from: `rows` of all texts, and a corpus of these and no others.

    `corpus.texts[k]` is the text of `rows[k]`. A row that is there twice is two texts.
    """

    rows: Rows
    corpus: Corpus

    @classmethod
    def of(cls, corpus: Corpus, rows: Sequence[int] | Rows) -> Part:
        """The part of a corpus' training texts that `rows` of `corpus.texts` name.

        Nothing that is held out is in its corpus, so no method can come to see it.
        """
        labels: dict[str, list[Text]] = defaultdict(list)
        for entry in corpus.entries:
            labels[entry.text].append(entry)
        entries, copies = [], Counter()
        for row in rows:
            text = corpus.texts[row]
            copies[text] += 1
            name = text if copies[text] == 1 else f"{text} (drawn {copies[text]} times)"
            entries += [replace(entry, text=name) for entry in labels[text]]
        present = {entry.concept for entry in entries}
        part = replace(
            corpus,
            concepts=[name for name in corpus.concepts if name in present],
            entries=entries,
            heldout=[],
            hard_negatives=[],
            min_positives=1,
        )
        return cls(np.asarray(rows, dtype=np.int64), part)


@dataclass(frozen=True, eq=False)
class Fold:
    """Directions are extracted from `training` and tried on `test`, rows of all texts."""

    training: Part
    test: Rows


@dataclass(frozen=True, eq=False)
class Split:
    """Folds that try every text of the split once, and what these texts are positives of."""

    name: str
    folds: list[Fold]
    labels: Bool[np.ndarray, "all_texts concepts"]

    @cached_property
    def rows(self) -> Rows:
        """The texts that are tried, in the order of their scores."""
        return np.concatenate([fold.test for fold in self.folds])

    @cached_property
    def positive(self) -> Bool[np.ndarray, "texts concepts"]:
        return self.labels[self.rows]

    @property
    def cross_validated(self) -> bool:
        """Whether a text is tried in one fold and extracted from in another."""
        return len(self.folds) > 1


def make_splits(
    corpus: Corpus, wanted: Iterable[str], folds: int, seed: int
) -> tuple[list[Split], dict[str, str]]:
    """The wanted splits that the corpus can give, and why it cannot give the others.

    `heldout`: from all training texts to those of `corpus.heldout`. `text`: stratified folds of the
    training texts. `scenario`: folds of paired scenarios, with all framings and versions of one in
    the same fold; texts that are not paired are always in training and never tried.
    """
    labels = membership_of(corpus, [*corpus.entries, *corpus.heldout])
    makers = {"heldout": _heldout, "text": _text, "scenario": _scenario}
    splits, left_out = [], {}
    for name in wanted:
        made = makers[name](corpus, folds, np.random.default_rng([seed, SPLITS.index(name)]))
        if isinstance(made, str):
            left_out[name] = made
        else:
            splits.append(Split(name, made, labels))
    return splits, left_out


def membership_of(
    corpus: Corpus, entries: Iterable[Text]
) -> Bool[np.ndarray, "all_texts concepts"]:
    """True where one of `corpus.all_texts` is a positive of a concept, by these entries."""
    row_of = {text: row for row, text in enumerate(corpus.all_texts)}
    column_of = {name: column for column, name in enumerate(corpus.concepts)}
    belongs = np.zeros((len(row_of), len(column_of)), dtype=bool)
    for entry in entries:
        if entry.concept is not None:
            belongs[row_of[entry.text], column_of[entry.concept]] = True
    return belongs


def stratified(corpus: Corpus, folds: int, rng: np.random.Generator) -> Int[np.ndarray, " texts"]:
    """The fold of each training text: concepts, and texts without one, are spread evenly.

    A text of several concepts goes by the first.
    """
    strata: dict[str | None, list[int]] = defaultdict(list)
    row_of = {text: row for row, text in enumerate(corpus.texts)}
    for text, entry in {e.text: e for e in reversed(corpus.entries)}.items():
        strata[entry.concept].append(row_of[text])
    fold, dealt = np.empty(len(row_of), dtype=np.int64), 0
    for rows in strata.values():
        # Dealing goes on where the last concept's ended, so that folds are of one size.
        fold[rng.permutation(rows)] = (dealt + np.arange(len(rows))) % folds
        dealt += len(rows)
    return fold


def resampled(corpus: Corpus, rng: np.random.Generator) -> Part:
    """As many training texts of each concept as there are, drawn with replacement."""
    strata: dict[str | None, list[int]] = defaultdict(list)
    row_of = {text: row for row, text in enumerate(corpus.texts)}
    for text, entry in {e.text: e for e in reversed(corpus.entries)}.items():
        strata[entry.concept].append(row_of[text])
    drawn = [rng.choice(rows, len(rows)) for rows in strata.values()]
    return Part.of(corpus, np.sort(np.concatenate(drawn)))


def _heldout(corpus: Corpus, folds: int, rng: np.random.Generator) -> list[Fold] | str:
    # One that is a training text too would be tried on directions made of it.
    texts = {text.text for text in corpus.heldout} - set(corpus.texts)
    if not texts:
        return "the corpus has no held-out texts (heldout/)"
    rows = [row for row, text in enumerate(corpus.all_texts) if text in texts]
    return [Fold(Part.of(corpus, np.arange(len(corpus.texts))), np.array(rows))]


def _text(corpus: Corpus, folds: int, rng: np.random.Generator) -> list[Fold] | str:
    most = max(len(corpus.positives(name)) for name in corpus.concepts)
    if most < 2:
        return "no concept has two texts, one to extract from and one to try"
    return _folds(corpus, stratified(corpus, min(folds, most), rng))


def _scenario(corpus: Corpus, folds: int, rng: np.random.Generator) -> list[Fold] | str:
    row_of = {text: row for row, text in enumerate(corpus.texts)}
    scenarios: dict[str, list[int]] = defaultdict(list)
    for text, entry in {e.text: e for e in corpus.entries if e.scenario is not None}.items():
        scenarios[entry.scenario].append(row_of[text])
    if len(scenarios) < 2:
        return "the corpus has fewer than two paired scenarios (paired/)"
    fold = np.full(len(row_of), -1)
    for place, number in enumerate(rng.permutation(len(scenarios))):
        fold[list(scenarios.values())[number]] = place % min(folds, len(scenarios))
    return _folds(corpus, fold)


def _folds(corpus: Corpus, fold: Int[np.ndarray, " texts"]) -> list[Fold]:
    """A fold for each number from 0; texts of number -1 are in training only."""
    return [
        Fold(Part.of(corpus, np.flatnonzero(fold != number)), np.flatnonzero(fold == number))
        for number in range(fold.max() + 1)
    ]
