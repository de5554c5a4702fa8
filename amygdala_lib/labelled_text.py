"""Labelled text: does a readout agree with people's labels, on texts not written for it?"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jaxtyping import Bool, Float

from .capture import Pool, capture
from .corpus_files import did_you_mean
from .errors import AmygdalaError
from .evaluate import auroc, average_precision
from .models import LanguageModel
from .readout import Readout

DRAWS = 1000
"""Bootstrap samples of the texts."""

Labels = Mapping[str, str | Sequence[str] | None]


@dataclass(frozen=True, eq=False)
class LabelledScores:
    """How well a readout agrees with the labels of a collection, at one layer.

    `frame` has one row per label that has concepts: `concepts`, `n` (texts with the label),
    `auroc` with `auroc_low` and `auroc_high`, and `average_precision` (`n / n_texts` by chance);
    NaN where no text, or every text, has the label. `scores` is texts by labels: the largest
    z-score among the label's concepts. `truth`, of that shape, is True where a text has the label.
    `unmapped` counts the texts of each label that has no concept; they stay in as texts without the
    others. Every interval is of 95%, over samples of the texts.
    """

    frame: pd.DataFrame
    scores: pd.DataFrame
    truth: pd.DataFrame
    layer: int
    macro_auroc: float
    macro_interval: tuple[float, float]
    top_1: float
    top_1_interval: tuple[float, float]
    chance: float
    unmapped: dict[str, int]
    notes: list[str]

    def summary(self) -> str:
        """The figures in a few lines, with the labels told apart best and worst."""
        measured = self.frame["auroc"].dropna().sort_values(ascending=False, kind="stable")
        asked = int(self.truth[measured.index].any(axis=1).sum())
        lines = [
            f"{len(self.scores)} texts, {len(measured)} labels, layer {self.layer}",
            f"macro AUROC {self.macro_auroc:.3f} "
            f"(95% {self.macro_interval[0]:.3f} to {self.macro_interval[1]:.3f}, chance 0.5)",
            f"top-1 accuracy {self.top_1:.3f} (95% {self.top_1_interval[0]:.3f} to "
            f"{self.top_1_interval[1]:.3f}, chance {self.chance:.3f}) on the {asked} texts with "
            "one of these labels",
            "best: " + ", ".join(f"{k} {v:.2f}" for k, v in measured[:5].items()),
            "worst: " + ", ".join(f"{k} {v:.2f}" for k, v in measured[::-1][:5].items()),
        ]
        if self.unmapped:
            named = ", ".join(f"{label} ({n})" for label, n in self.unmapped.items())
            lines.append(f"no concept for: {named}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def label_map(name: str) -> dict[str, list[str] | None]:
    """A shipped mapping: for each label of a collection the concepts that fit it best, or None.

    "goemotions" (27 labels and neutral), "isear" (7) and "empathetic_dialogues" (32). Raises
    AmygdalaError for another name.
    """
    return dict(_shipped(name)["labels"])


def evaluate_on(
    frame: pd.DataFrame | Path | str,
    readout: Readout,
    lm: LanguageModel,
    *,
    text: str = "text",
    label: str | Sequence[str] = "label",
    mapping: str | Labels | None = None,
    layer: int | None = None,
    pool: Pool = "mean",
    cache: Path | str | None = "default",
    max_texts: int | None = None,
    seed: int = 0,
) -> LabelledScores:
    """Read labelled texts with a readout, and compare.

    `frame` is a DataFrame, or the path of a .csv, .tsv or .jsonl. The column `label` holds a label,
    a list of them, or several in one string, with commas or semicolons between them; a list of
    columns stands for labels with 0 or 1 in each row. Labels are compared in lower case. Rows with
    the same text are one text with the labels of all.

    `mapping` says which concepts a label stands for: the name of a shipped one (see `label_map`), a
    dict from label to a concept, several or None, or None if the labels are concepts themselves. Of
    a shipped mapping, concepts that the readout lacks are left out. GoEmotions may be labelled with
    its numbers.

    Each text is captured with `pool` at `layer` (by default the readout's nearest to two thirds of
    depth) and projected (`Readout.project`, z-scores); the score for a label is the largest among
    its concepts. AUROC, average precision and intervals are per label and over all texts. Top-1
    goes by scores standardised per label over these texts, among the labels that occur, on texts
    with at least one of them: a hit is any of them. `max_texts` takes that many at random. Texts
    longer than the model can read are cut at the end.

    Raises AmygdalaError with all that is wrong, by row (from 0): unknown columns, layers, labels or
    concepts, empty texts, rows without a label, cells that are not 0 or 1.
    """
    table = _table(frame)
    meanings, numbers, replacements = _mapping(mapping, readout)
    problems = _wrong_arguments(readout, lm, layer, pool, max_texts)
    columns = [label] if isinstance(label, str) else list(label)
    if absent := [c for c in (text, *columns) if c not in table.columns]:
        there = ", ".join(map(str, table.columns))
        problems.append(f"no column {', '.join(map(repr, absent))}: there are {there}")
    if not columns:
        problems.append("label is an empty list: name at least one column")
    if table.empty:
        problems.append("there are no rows: give at least two labelled texts")
    if not problems:
        problems += _wrong_texts(table[text])
        rows, wrong = _labels(table, label, numbers)
        problems += wrong + _unknown_labels(rows, meanings)
    problems += _unknown_concepts(mapping, meanings, readout)
    if problems:
        raise AmygdalaError("\n".join(problems))

    notes = []
    merged = _merged(table[text], rows, replacements)
    if len(merged) < len(table):
        notes.append(f"{len(table) - len(merged)} rows repeat a text: their labels were joined")
    if max_texts is not None and len(merged) > max_texts:
        kept = np.random.default_rng(seed).choice(len(merged), max_texts, replace=False)
        notes.append(f"{max_texts} of {len(merged)} texts, drawn at random with seed {seed}")
        texts = list(merged)
        merged = {texts[row]: merged[texts[row]] for row in sorted(kept)}
    mapped = _in_readout(meanings, readout, notes)
    truth = pd.DataFrame(
        [[name in found for name in mapped] for found in merged.values()],
        index=pd.Index(merged, name="text"),
        columns=list(mapped),
        dtype=bool,
    )
    if not (truth.any() & ~truth.all()).any():
        raise AmygdalaError(
            "nothing to tell apart: no label with a concept is on some of the texts and not on "
            f"others (labels there: {', '.join(sorted({*sum(map(list, merged.values()), [])}))})"
        )
    layer = _default_layer(readout, lm) if layer is None else layer
    z = _read(lm, readout, list(merged), layer, pool, cache, notes)
    scores = pd.DataFrame(
        {name: z[:, columns].max(1) for name, columns in mapped.items()}, index=truth.index
    )
    unmapped = Counter(name for found in merged.values() for name in found if name not in mapped)
    made_with = readout.directions.provenance.get("pool", pool)
    if made_with != pool:
        notes.append(f"the directions were made with pool={made_with!r}, the texts read by {pool}")
    return _scored(
        scores,
        truth,
        {name: [readout.directions.concepts[c] for c in found] for name, found in mapped.items()},
        layer,
        dict(unmapped.most_common()),
        notes,
        seed,
    )


# Input


def _table(source: pd.DataFrame | Path | str) -> pd.DataFrame:
    if isinstance(source, pd.DataFrame):
        return source.reset_index(drop=True)
    path = Path(source).expanduser()
    readers = {
        ".csv": lambda: pd.read_csv(path, dtype=str, keep_default_na=False),
        ".tsv": lambda: pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False),
        ".jsonl": lambda: pd.DataFrame(_json_lines(path)),
    }
    if path.suffix.lower() not in readers:
        raise AmygdalaError(
            f"{path} is not .csv, .tsv or .jsonl: read it with pandas and give the DataFrame"
        )
    if not path.is_file():
        raise AmygdalaError(f"no file {path}: give the path of the labelled texts you downloaded")
    try:
        return readers[path.suffix.lower()]()
    except ValueError as error:  # of which pandas' and json's own errors are kinds
        raise AmygdalaError(
            f"{path} cannot be read ({error}): mend that line, or read the file with pandas and "
            "give the DataFrame"
        ) from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg}") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"line {number} is not an object")
    return rows


@functools.cache
def _all_shipped() -> dict[str, dict[str, Any]]:
    path = Path(__file__).with_name("label_maps.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _shipped(name: str) -> dict[str, Any]:
    if name not in _all_shipped():
        known = _all_shipped()
        raise AmygdalaError(
            f"no mapping {name!r}: there are {', '.join(known)}{did_you_mean(name, known)}, or "
            "give a dict from label to concepts"
        )
    return _all_shipped()[name]


def _mapping(
    mapping: str | Labels | None, readout: Readout
) -> tuple[dict[str, list[str]], dict[str, str], dict[str, str]]:
    """Concepts by label, labels by their number, and what to replace in texts."""
    shipped = _shipped(mapping) if isinstance(mapping, str) else {}
    given = shipped.get("labels", mapping)
    if given is None:
        given = {concept: concept for concept in readout.directions.concepts}
    meanings = {
        _normal(name): [found] if isinstance(found, str) else list(found or ())
        for name, found in given.items()
    }
    numbers = {}
    if "numbers_from" in shipped:
        numbers = {str(i): n for i, n in enumerate(meanings, start=shipped["numbers_from"])}
    return meanings, numbers, shipped.get("replace", {})


def _normal(label: object) -> str:
    if isinstance(label, float | np.floating) and float(label).is_integer():
        label = int(label)  # a column of whole numbers with a gap is one of floats
    return str(label).strip().strip("'\"").strip().lower()


def _wrong_arguments(
    readout: Readout, lm: LanguageModel, layer: int | None, pool: str, max_texts: int | None
) -> list[str]:
    problems = []
    dirs = readout.directions
    if layer is not None and layer not in dirs.vectors:
        problems.append(f"this readout has no layer {layer}: it has {dirs.layers}")
    if pool not in ("last", "mean"):
        problems.append(f"pool is {pool!r}: a text has one score, so choose 'mean' or 'last'")
    if max_texts is not None and max_texts < 2:
        problems.append(f"max_texts is {max_texts}: give at least 2, or None for all")
    if (width := lm.model.config.get_text_config().hidden_size) != dirs.hidden_size:
        problems.append(
            f"{lm.name} has a hidden size of {width}, the readout {dirs.hidden_size}: load the "
            f"model it was made for ({dirs.provenance.get('model', 'not recorded')})"
        )
    return problems


def _wrong_texts(texts: pd.Series) -> list[str]:
    strings = texts.map(lambda value: isinstance(value, str)).to_numpy(bool)
    missing = texts.isna().to_numpy(bool)
    blank = np.array([isinstance(value, str) and not value.strip() for value in texts], bool)
    problems = []
    if (empty := np.flatnonzero(missing | blank)).size:
        problems.append(f"the text is empty in {_rows(empty)}: remove these rows")
    if (other := np.flatnonzero(~strings & ~missing)).size:
        problems.append(f"the text is not a string in {_rows(other)}: {texts.iloc[other[0]]!r}")
    return problems


def _labels(
    table: pd.DataFrame, label: str | Sequence[str], numbers: Mapping[str, str]
) -> tuple[list[frozenset[str]], list[str]]:
    """The labels of each row, and what is wrong with them."""
    if not isinstance(label, str):
        return _from_columns(table[list(label)])
    cells = [_cell(value) for value in table[label]]
    problems = []
    if without := [row for row, found in enumerate(cells) if found is None]:
        problems.append(
            f"no label in {_rows(without)}: remove these rows, or give an empty list where none "
            "applies"
        )
    return [frozenset(numbers.get(name, name) for name in found or ()) for found in cells], problems


def _cell(value: object) -> list[str] | None:
    """The labels in one cell; None if it is empty, which an empty list is not."""
    if isinstance(value, str):
        inner = re.fullmatch(r"\s*[\[({](.*)[\])}]\s*", value, re.DOTALL)  # a list, as CSV has it
        if inner is None and not value.strip():
            return None
        value = re.split(r"[,;]", inner[1] if inner else value)
    elif not isinstance(value, Iterable):
        if pd.isna(value):
            return None
        value = [value]
    return [name for name in map(_normal, value) if name]


def _from_columns(columns: pd.DataFrame) -> tuple[list[frozenset[str]], list[str]]:
    problems, held = [], {}
    for name in columns:
        values = pd.to_numeric(columns[name], errors="coerce").to_numpy(float)
        if (bad := np.flatnonzero(~np.isin(values, (0, 1)))).size:
            shown = columns[name].iloc[bad[0]]
            problems.append(f"{name} is not 0 or 1 in {_rows(bad)} (first: {shown!r})")
        held[_normal(name)] = values == 1
    return [
        frozenset(n for n, v in held.items() if v[row]) for row in range(len(columns))
    ], problems


def _unknown_labels(rows: Sequence[frozenset[str]], meanings: Mapping[str, list[str]]) -> list[str]:
    found: dict[str, list[int]] = {}
    for row, names in enumerate(rows):
        for name in sorted(names - {*meanings}):
            found.setdefault(name, []).append(row)
    problems = [
        f"unknown label {name!r} in {_rows(at)}{did_you_mean(name, meanings)}"
        for name, at in list(found.items())[:20]
    ]
    if len(found) > 20:
        problems.append(f"and {len(found) - 20} more unknown labels")
    if found:
        problems.append(
            "put every label into `mapping`, as a dict; None for one that no concept fits"
        )
    return problems


def _unknown_concepts(
    mapping: str | Labels | None, meanings: Mapping[str, list[str]], readout: Readout
) -> list[str]:
    """Names in a mapping of the caller's own that the readout lacks: likely a slip."""
    if mapping is None or isinstance(mapping, str):
        return []
    known = readout.directions.concepts
    return [
        f"label {name!r} is mapped to {concept!r}, which this readout does not have"
        f"{did_you_mean(concept, known)}"
        for name, concepts in meanings.items()
        for concept in concepts
        if concept not in known
    ]


def _rows(rows: Sequence[int] | np.ndarray) -> str:
    shown = ", ".join(str(int(row)) for row in rows[:8])
    if len(rows) == 1:
        return f"row {shown}"
    return f"{len(rows)} rows ({shown}{', ...' if len(rows) > 8 else ''})"


# Reading


def _merged(
    texts: Iterable[str], rows: Iterable[frozenset[str]], replacements: Mapping[str, str]
) -> dict[str, frozenset[str]]:
    merged: dict[str, frozenset[str]] = {}
    for text, names in zip(texts, rows, strict=True):
        for old, new in replacements.items():
            text = text.replace(old, new)
        merged[text] = merged.get(text, frozenset()) | names
    return merged


def _in_readout(
    meanings: Mapping[str, list[str]], readout: Readout, notes: list[str]
) -> dict[str, list[int]]:
    """Columns of the readout for each label that has any."""
    concepts = readout.directions.concepts
    absent = sorted({c for found in meanings.values() for c in found} - {*concepts})
    if absent:
        notes.append(f"not in this readout, and left out: {', '.join(absent)}")
    mapped = {
        name: [concepts.index(c) for c in found if c in concepts]
        for name, found in meanings.items()
    }
    return {name: columns for name, columns in mapped.items() if columns}


def _default_layer(readout: Readout, lm: LanguageModel) -> int:
    """Two thirds of depth is where concepts are usually clearest."""
    return min(readout.directions.layers, key=lambda layer: abs(layer + 1 - len(lm.layers) * 2 / 3))


def _read(
    lm: LanguageModel,
    readout: Readout,
    texts: list[str],
    layer: int,
    pool: Pool,
    cache: Path | str | None,
    notes: list[str],
) -> Float[np.ndarray, "texts concepts"]:
    cut, shortened = _cut(lm, texts)
    if shortened:
        notes.append(f"{shortened} texts were cut to what {lm.name} can read")
    acts = capture(lm, cut, [layer], pool=pool, cache=cache, progress=len(texts) > 100)
    # Texts that begin alike may be the same once cut, and are then captured once.
    row_of = {text: row for row, text in enumerate(acts.texts)}
    return readout.project(acts[layer], layer).numpy()[[row_of[text] for text in cut]]


def _cut(lm: LanguageModel, texts: list[str]) -> tuple[list[str], int]:
    """Texts of no more tokens than the model reads, and how many were longer."""
    config = lm.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    encoded = lm.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    cut, shortened = list(texts), 0
    for number, ids in enumerate(encoded):
        if len(ids) <= longest:
            continue
        shortened += 1
        cut[number] = _beginning(lm, texts[number], longest)
    return cut, shortened


def _beginning(lm: LanguageModel, text: str, longest: int) -> str:
    room = longest
    while True:
        spans = lm.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        text_cut = text[: spans[room - 1][1]]
        length = len(lm.tokenizer(text_cut, verbose=False)["input_ids"])
        if length <= longest:
            return text_cut
        room -= length - longest  # special tokens, or an end that is split otherwise now


# Figures


def _scored(
    scores: pd.DataFrame,
    truth: pd.DataFrame,
    concepts: Mapping[str, list[str]],
    layer: int,
    unmapped: dict[str, int],
    notes: list[str],
    seed: int,
) -> LabelledScores:
    values, positive = scores.to_numpy(float), truth.to_numpy()
    found = auroc(values, positive)
    drawn, weights = _resampled(values, positive, np.random.default_rng(seed))
    low, high = np.array([_interval(column) for column in drawn.T]).T
    frame = pd.DataFrame(
        {
            "concepts": [", ".join(concepts[name]) for name in scores],
            "n": positive.sum(0),
            "auroc": found,
            "auroc_low": low,
            "auroc_high": high,
            "average_precision": average_precision(values, positive),
        },
        index=pd.Index(scores.columns, name="label"),
    )
    measured = ~np.isnan(found)
    hits, chance = _top_1(values[:, measured], positive[:, measured])
    asked = ~np.isnan(hits)
    with np.errstate(invalid="ignore"):  # a draw may have none of the texts that are asked about
        top_1_drawn = weights[:, asked] @ hits[asked] / weights[:, asked].sum(1)
    return LabelledScores(
        frame=frame,
        scores=scores,
        truth=truth,
        layer=layer,
        macro_auroc=float(found[measured].mean()),
        macro_interval=_interval(np.ma.masked_invalid(drawn[:, measured]).mean(1).filled(np.nan)),
        top_1=float(hits[asked].mean()),
        top_1_interval=_interval(top_1_drawn),
        chance=chance,
        unmapped=unmapped,
        notes=notes,
    )


def _top_1(
    values: Float[np.ndarray, "texts labels"], positive: Bool[np.ndarray, "texts labels"]
) -> tuple[Float[np.ndarray, " texts"], float]:
    """1 where the highest label is one of the text's, else 0, NaN for texts without; and chance.

    Standardised first: raw scores differ between labels in offset and spread more than in signal.
    """
    spread = values.std(0)
    standard = (values - values.mean(0)) / np.where(spread > 0, spread, 1)
    hits = positive[np.arange(len(values)), standard.argmax(1)].astype(float)
    asked = positive.any(1)
    hits[~asked] = np.nan
    return hits, float(positive[asked].mean())


def _resampled(
    values: Float[np.ndarray, "texts labels"],
    positive: Bool[np.ndarray, "texts labels"],
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "draws labels"], Float[np.ndarray, "draws texts"]]:
    """AUROC of every label in each sample of the texts, and how often it has each text.

    Per label, positives are placed among the sorted negatives once; a sample then only changes how
    often each counts.
    """
    n = len(values)
    weights = np.empty((DRAWS, n), dtype=np.float32)
    for row in range(DRAWS):
        weights[row] = np.bincount(rng.integers(n, size=n), minlength=n)
    drawn = np.full((DRAWS, values.shape[1]), np.nan)
    for column in range(values.shape[1]):
        own = np.flatnonzero(positive[:, column])
        others = np.flatnonzero(~positive[:, column])
        if not (own.size and others.size):
            continue
        others = others[np.argsort(values[others, column])]
        below = np.searchsorted(values[others, column], values[own, column], side="left")
        up_to = np.searchsorted(values[others, column], values[own, column], side="right")
        for row, weight in enumerate(weights):
            under = np.concatenate([[0.0], np.cumsum(weight[others], dtype=float)])
            u = (weight[own] * (under[below] + under[up_to]) / 2).sum()
            if pairs := weight[own].sum(dtype=float) * under[-1]:
                drawn[row, column] = u / pairs
    return drawn, weights


def _interval(drawn: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    usable = drawn[~np.isnan(drawn)]
    low, high = np.percentile(usable, [2.5, 97.5]) if len(usable) else (np.nan, np.nan)
    return float(low), float(high)
