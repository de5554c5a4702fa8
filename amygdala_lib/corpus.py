"""The corpus: texts, the concept each one embodies, and a check before any model is loaded."""

from __future__ import annotations

import hashlib
import json
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .artefacts import repository_root
from .corpus_files import (
    KINDS,
    Concept,
    CorpusFiles,
    Text,
    did_you_mean,
    white_space_normalised,
)
from .errors import CorpusError
from .memory_graph import TrainingPair, from_memory_graph

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Concept",
    "Corpus",
    "Preflight",
    "Text",
    "TrainingPair",
    "from_memory_graph",
    "load_corpus",
    "preflight",
]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Labelled texts, ready to be run through a model once each.

    Every concept named in `entries`, `heldout` and `hard_negatives` is one of `concepts`; texts of
    concepts with fewer than `min_positives` texts are left out of all three. The `concept` of a
    hard negative is the one it could be taken for and is not: the state negated, its word only
    mentioned, or the state observed in somebody else.
    """

    root: Path
    manifest: dict[str, Concept]
    concepts: list[str]
    entries: list[Text]
    neutral: list[str]
    heldout: list[Text]
    min_positives: int
    hard_negatives: list[Text] = field(default_factory=list)

    @cached_property
    def texts(self) -> list[str]:
        """Every distinct text of the training split, in order of first occurrence."""
        return list(dict.fromkeys(entry.text for entry in self.entries))

    @cached_property
    def all_texts(self) -> list[str]:
        """`texts`, then held-out texts, then hard negatives, each once: what `evaluate` reads."""
        others = (text.text for text in (*self.heldout, *self.hard_negatives))
        return list(dict.fromkeys([*self.texts, *others]))

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) over all texts and labels, whatever folder the corpus lies in."""
        splits = [
            [[t.text, t.kind, t.concept, t.scenario, t.version] for t in split]
            for split in (self.entries, self.heldout, self.hard_negatives)
        ]
        record = json.dumps([self.concepts, *splits, self.neutral])
        return hashlib.sha256(record.encode()).hexdigest()

    @cached_property
    def _rows(self) -> dict[str, list[int]]:
        row_of = {text: row for row, text in enumerate(self.texts)}
        rows: dict[str, set[int]] = {name: set() for name in self.concepts}
        for entry in self.entries:
            if entry.concept is not None:
                rows[entry.concept].add(row_of[entry.text])
        return {name: sorted(found) for name, found in rows.items()}

    def positives(self, concept: str) -> np.ndarray:
        """Rows of `texts` that embody `concept`: (n,) int64, ascending, each once.

        Raises CorpusError for a name that is not one of `concepts`.
        """
        if concept not in self._rows:
            if concept in self.manifest:
                why = f"it has fewer than {self.min_positives} texts here; add some in {self.root}"
            else:
                hint = did_you_mean(concept, self.concepts)
                why = f"choose one of corpus.concepts{hint}"
            raise CorpusError(f"no concept {concept!r} in this corpus: {why}")
        return np.array(self._rows[concept], dtype=np.int64)

    def negatives(self, concept: str) -> np.ndarray:
        """Rows of `texts` that embody another concept or none: (n,) int64, ascending, each once.

        Raises CorpusError for a name that is not one of `concepts`.
        """
        everything = np.arange(len(self.texts), dtype=np.int64)
        return np.setdiff1d(everything, self.positives(concept), assume_unique=True)

    def select(self, kinds: Iterable[str] = KINDS) -> Corpus:
        """The same corpus with only these kinds of text; conceptless and held-out texts stay.

        `select(["direct"])` leaves the direct descriptions and all shared negatives. Warns about
        concepts left with fewer than `min_positives` texts, which are dropped; raises CorpusError
        for an unknown kind and when no concept is left.
        """
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise CorpusError(f"unknown kinds of text {unknown}: choose from {list(KINDS)}")
        kept = [e for e in self.entries if e.concept is None or e.kind in kinds]
        return _without_thin(
            replace(self, entries=kept),
            f"no concept in {self.root} has {self.min_positives} texts of kind "
            f"{' or '.join(kinds) or '(none asked for)'}: choose more of {list(KINDS)}",
        )

    def only(self, texts: Collection[str]) -> Corpus:
        """The same corpus with only these of its training texts; what is held out stays.

        Concepts left with fewer than `min_positives` of them are dropped, with a warning. Raises
        CorpusError when no concept is left.
        """
        texts = set(texts)
        return _without_thin(
            replace(self, entries=[e for e in self.entries if e.text in texts]),
            f"{len(texts)} texts are too few: none of the concepts in {self.root} has "
            f"{self.min_positives} of them",
        )

    def counts(self) -> pd.DataFrame:
        """Texts per concept: columns story, direct, paired, total (distinct), words, cluster."""
        import pandas as pd

        return pd.DataFrame.from_dict(self._counts(), orient="index").rename_axis("concept")

    def _counts(self) -> dict[str, dict[str, Any]]:
        number = Counter((entry.concept, entry.kind) for entry in self.entries)
        return {
            name: {
                **{kind: number[name, kind] for kind in KINDS},
                "total": len(rows),
                "words": sum(len(self.texts[row].split()) for row in rows),
                "cluster": self.manifest[name].cluster,
            }
            for name, rows in self._rows.items()
        }

    def summary(self) -> str:
        """What the corpus holds, in one line."""
        clusters = {self.manifest[name].cluster for name in self.concepts}
        scenarios = {entry.scenario for entry in self.entries} - {None}
        conceptless = {entry.text for entry in self.entries if entry.concept is None}
        words = sum(len(text.split()) for text in self.texts)
        return (
            f"{len(self.concepts)} concepts in {len(clusters)} clusters: "
            f"{len(self.texts)} texts ({len(conceptless)} without a concept, {len(scenarios)} "
            f"paired scenarios), {words:,} words; {len(self.neutral)} neutral, "
            f"{len(self.heldout)} held out, {len(self.hard_negatives)} hard negatives; "
            f"hash {self.hash[:8]}"
        )


@dataclass(frozen=True)
class Preflight:
    """What reading a corpus folder found; `corpus` is None when there are problems."""

    root: Path
    problems: list[str]
    warnings: list[str]
    corpus: Corpus | None

    def report(self) -> str:
        """Counts, warnings, then problems, for a terminal; counts go by cluster when many."""
        lines = [f"corpus folder: {self.root}"]
        if self.corpus is not None:
            table, fewest = _count_table(self.corpus)
            longest = max(self.corpus.entries, key=lambda entry: len(entry.text.split()))
            lines += [*_wrap(self.corpus.summary()), "", *table, "", *_wrap(fewest)]
            lines.append(f"longest text: {len(longest.text.split())} words ({longest.path})")
        for title, found in (("warnings", self.warnings), ("problems", self.problems)):
            lines.append(f"{title}: {len(found) or 'none'}")
            for message in found:
                lines += _wrap(f"  - {message}")
        lines.append("ready to use" if self.corpus else "not usable until the problems are mended")
        return "\n".join(lines)


def load_corpus(path: str | Path = "corpus", *, min_positives: int = 2) -> Corpus:
    """Read a corpus folder, or raise CorpusError with everything that is wrong with it.

    A relative path is looked for here, then in the repository; "affect_world" is the bundled
    model's own world, where no folder has that name. Warns, by name, about empty files, files that
    are not read and concepts with fewer than `min_positives` distinct texts, which are dropped.
    """
    if str(path) == "affect_world" and not Path(path).exists():
        from .demo.affect_world import AffectWorld

        return AffectWorld().corpus()
    found = preflight(path, min_positives=min_positives)
    if found.corpus is None:
        raise CorpusError(
            f"the corpus in {found.root} has {len(found.problems)} problem(s):\n"
            + "\n".join(f"  - {problem}" for problem in found.problems)
            + "\nMend them, then check again with: amygdala corpus check"
        )
    for message in found.warnings:
        warnings.warn(f"corpus {found.root}: {message}", stacklevel=2)
    return found.corpus


def preflight(path: str | Path = "corpus", *, min_positives: int = 2) -> Preflight:
    """Read a corpus folder and list every problem and warning at once, raising none of them."""
    root = Path(path).expanduser()
    if not root.exists() and (repository_root() / root).is_dir():
        root = repository_root() / root  # notebooks run in their own folder
    if wrong := _wrong_arguments(root, min_positives):
        return Preflight(root, wrong, [], None)
    files = CorpusFiles(root)
    corpus, dropped = _drop_thin(
        Corpus(
            root=root,
            manifest=files.manifest,
            concepts=list(files.manifest),
            entries=_same_wording(files.entries),
            neutral=[text.text for text in files.neutral],
            heldout=files.heldout,
            min_positives=min_positives,
            hard_negatives=files.hard_negatives,
        )
    )
    if dropped:
        files.warnings.append(_dropped_message(dropped, min_positives))
    if not files.problems and not corpus.concepts:
        files.problems.append(
            f"nothing usable: no concept has {min_positives} texts; "
            "add some in stories/, direct/ or paired/ (README.md there says how)"
        )
    return Preflight(root, files.problems, files.warnings, None if files.problems else corpus)


def _wrong_arguments(root: Path, min_positives: int) -> list[str]:
    wrong = []
    if min_positives < 1:
        wrong.append(f"min_positives is {min_positives}: give a whole number from 1")
    if not root.exists():
        wrong.append(f"no folder {root}: give the path of a corpus (looked in {Path.cwd()})")
    elif not root.is_dir():
        wrong.append(f"{root} is a file: give the folder that holds manifest.yaml")
    elif not (root / "manifest.yaml").exists():
        inner = root / "corpus"
        hint = f"give {inner} instead" if inner.is_dir() else "README.md in corpus/ says how"
        wrong.append(f"manifest.yaml is missing in {root}: {hint}")
    return wrong


def _drop_thin(corpus: Corpus) -> tuple[Corpus, dict[str, int]]:
    """Leave out concepts with too few texts, so that no label outlives its concept."""
    positives: dict[str | None, set[str]] = defaultdict(set)
    for entry in corpus.entries:
        positives[entry.concept].add(entry.text)
    number = {name: len(positives[name]) for name in corpus.concepts}
    kept = [name for name in corpus.concepts if number[name] >= corpus.min_positives]
    known = {None, *kept}
    thinned = replace(
        corpus,
        concepts=kept,
        entries=[entry for entry in corpus.entries if entry.concept in known],
        heldout=[text for text in corpus.heldout if text.concept in known],
        hard_negatives=[text for text in corpus.hard_negatives if text.concept in known],
    )
    return thinned, {name: n for name, n in number.items() if name not in known}


def _without_thin(corpus: Corpus, if_empty: str) -> Corpus:
    """`_drop_thin` with a warning; raises CorpusError if no concept is left."""
    thinned, dropped = _drop_thin(corpus)
    if not thinned.concepts:
        raise CorpusError(if_empty)
    if dropped:
        message = _dropped_message(dropped, corpus.min_positives)
        warnings.warn(f"corpus {corpus.root}: {message}", stacklevel=3)
    return thinned


def _dropped_message(dropped: dict[str, int], min_positives: int) -> str:
    named = ", ".join(f"{name} ({number})" for name, number in dropped.items())
    return f"dropped, fewer than {min_positives} distinct texts: {named}"


def _wrap(line: str) -> list[str]:
    return textwrap.wrap(
        line, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _count_table(corpus: Corpus) -> tuple[list[str], str]:
    """Rows of counts, and a line that names the concepts with the fewest texts."""
    columns = (*KINDS, "total", "words")
    rows, heading = corpus._counts(), "concept"
    thinnest = sorted(rows, key=lambda name: rows[name]["total"])[:8]
    fewest = ", ".join(f"{name} ({rows[name]['total']})" for name in thinnest)
    if len(rows) > 30:  # more would not fit a screen
        by_cluster: dict[str, Counter] = defaultdict(Counter)
        for count in rows.values():
            by_cluster[count["cluster"]].update({column: count[column] for column in columns})
        rows, heading = by_cluster, "cluster"
    width = max(map(len, [heading, *rows]))
    lines = [f"{heading:<{width}}" + "".join(f"{column:>8}" for column in columns)]
    for name, count in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{count[column]:>8}" for column in columns))
    return lines, f"fewest texts: {fewest}"


def _same_wording(entries: Sequence[Text]) -> list[Text]:
    """Give texts that differ in white space alone one wording, so that they are run once."""
    first: dict[str, str] = {}
    return [
        replace(e, text=first.setdefault(white_space_normalised(e.text), e.text)) for e in entries
    ]
