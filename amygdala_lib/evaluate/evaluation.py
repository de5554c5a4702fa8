"""Evaluation: what came out, which method and layer to take, and the file it is kept in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..artefacts import provenance, read_json, write_json
from ..errors import AmygdalaError, ArtefactError
from ..models import EMBEDDING

TABLES = {
    "concepts": ["method", "layer", "split", "concept"],
    "summary": ["method", "layer", "split"],
    "hard": ["method", "layer", "kind"],
    "stability": ["method", "layer", "concept"],
    "nulls": ["kind", "method", "layer", "split"],
    "mistaken": [
        *("method", "layer", "split", "concept"),
        *("twin", "taken", "n_texts", "examples"),
    ],
    "clusters": ["method", "layer", "split", "cluster", "taken_for", "n_texts"],
}
"""The frames of an evaluation, and the columns that each must have."""
_TEXT = {"method", "split", "concept", "kind", "twin", "examples", "cluster", "taken_for"}
_MADE_BY = "`amy.evaluate(...).save(folder)`"


class Recommendation(NamedTuple):
    """The method and layer with the highest median AUROC on a split; str() says it in words.

    `margin` is how far the median lies above the runner-up's, with a 95% interval over concepts.
    The best of many is best by luck too: on new texts expect a little less than `median_auroc`.
    """

    method: str
    layer: int
    split: str
    median_auroc: float
    n_concepts: int
    runner_up: tuple[str, int] | None = None
    margin: float = np.nan
    low: float = np.nan
    high: float = np.nan

    def __str__(self) -> str:
        words = (
            f"{_place(self.method, self.layer)}: median AUROC {self.median_auroc:.3f} over "
            f"{self.n_concepts} concepts on the split {self.split!r}"
        )
        if self.runner_up is None:
            return f"{words}; nothing else was evaluated there"
        verdict = "told apart" if self.low > 0 else "not told apart by these texts"
        return (
            f"{words}, {self.margin:.3f} above {_place(*self.runner_up)} "
            f"(95% interval {self.low:+.3f} to {self.high:+.3f}: {verdict})"
        )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well directions of each method and layer do on texts they were not made of.

    `concepts` has a row per method, layer, split and concept; `summary` one per method, layer and
    split; `hard` one per method, layer and kind of hard negative; `stability` one per method, layer
    and concept; `nulls` says what directions of chance do. `mistaken` is what `twins` reads, its
    `examples` naming `texts`; `clusters` is what `cluster_confusion` reads. `left_out` says why a
    split that was asked for is not there.

    Columns: `*_low` and `*_high` bound a 95% interval; `embedding_*` is the same method on the
    embeddings (NaN unless layer -1 was captured), `words_*` a bag of words; `p` is against random
    directions, `p_permutation` against labels dealt out at random, `p_adjusted` the larger of the
    two after Benjamini-Hochberg over concepts, `significant` whether that is below 0.05. On splits
    with folds only `p_permutation` allows for texts that score one another (see `moderated`).
    """

    concepts: pd.DataFrame
    summary: pd.DataFrame
    hard: pd.DataFrame
    stability: pd.DataFrame
    nulls: pd.DataFrame
    mistaken: pd.DataFrame
    clusters: pd.DataFrame
    texts: Mapping[int, str]
    left_out: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def recommend(
        self, split: str | None = None, *, draws: int = 1000, seed: int = 0
    ) -> Recommendation:
        """The method and layer with the highest median AUROC on a split, and by how much.

        `split` defaults to the first that was evaluated. The mean decides between equal medians.
        The embeddings are a baseline and not recommended, unless there is nothing else. A concept
        that a method has no direction for counts as 0.5 there, so that all are compared on the same
        concepts. Raises AmygdalaError for a split that was not evaluated, or if no concept has an
        AUROC there.
        """
        split = self._known("split", split)
        rows = self.concepts[self.concepts["split"] == split]
        if (rows["layer"] != EMBEDDING).any():
            rows = rows[rows["layer"] != EMBEDDING]
        aurocs = rows.pivot(index="concept", columns=["method", "layer"], values="auroc")
        aurocs = aurocs.dropna(how="all").fillna(0.5)
        if aurocs.empty:
            raise AmygdalaError(f"no concept has an AUROC on the split {split!r}: choose another")
        ranking = pd.DataFrame({"median": aurocs.median(), "mean": aurocs.mean()})
        ranking = ranking.sort_values(["median", "mean"], ascending=False, kind="stable")
        method, layer = best = ranking.index[0]
        found = {
            "method": method,
            "layer": int(layer),
            "split": split,
            "median_auroc": float(ranking["median"].iloc[0]),
            "n_concepts": len(aurocs),
        }
        if len(ranking) == 1:
            return Recommendation(**found)
        second = ranking.index[1]
        both = aurocs[[best, second]].to_numpy()
        found["runner_up"] = (second[0], int(second[1]))
        chosen = np.random.default_rng(seed).integers(len(both), size=(draws, len(both)))
        medians = np.median(both[chosen], axis=1)
        low, high = np.quantile(medians[:, 0] - medians[:, 1], [0.025, 0.975])
        margin = np.subtract(*np.median(both, axis=0))
        return Recommendation(**found, margin=float(margin), low=float(low), high=float(high))

    def twins(
        self, layer: int, method: str | None = None, split: str | None = None
    ) -> pd.DataFrame:
        """For each concept the other that its texts are most often taken for, with three of them.

        Columns `twin`, `taken` (how many of its texts) of `n_texts`, and `examples`; concepts whose
        texts are all recognised are not there. `method` and `split` default to the first evaluated.
        Raises AmygdalaError for a layer, method or split that was not evaluated.
        """
        rows = self._at(self.mistaken, layer, method, split)
        examples = [[self.texts[number] for number in held] for held in rows["examples"]]
        rows = rows.assign(examples=examples).set_index("concept")
        rows = rows[["twin", "taken", "n_texts", "examples"]]
        return rows.sort_values("taken", ascending=False, kind="stable")

    def cluster_confusion(
        self, layer: int, method: str | None = None, split: str | None = None
    ) -> pd.DataFrame:
        """How many texts of each cluster (rows) are taken for a concept of each (columns).

        For `plots.cluster_confusion`. Empty for a corpus without a manifest. `method` and `split`
        default to the first evaluated; raises AmygdalaError for what was not evaluated.
        """
        rows = self._at(self.clusters, layer, method, split)
        names = sorted({*rows["cluster"], *rows["taken_for"]})
        counts = rows.pivot(index="cluster", columns="taken_for", values="n_texts")
        return counts.reindex(index=names, columns=names).fillna(0).astype(int)

    def save(self, folder: Path | str, **facts: Any) -> Path:
        """Write `evaluation.json` into `folder`; `facts` join the provenance. Returns the path.

        Numbers keep six digits. Raises ArtefactError for a fact that JSON cannot hold.
        """
        path = Path(folder) / "evaluation.json"
        written_by = ("format_version", "versions")
        origin = {k: v for k, v in self.provenance.items() if k not in written_by}
        tables = {name: _as_lists(getattr(self, name)) for name in TABLES}
        texts = {str(number): text for number, text in self.texts.items()}
        content = {**provenance(**origin), **facts, "left_out": self.left_out, **tables}
        write_json(path, {**content, "texts": texts})
        return path

    @classmethod
    def load(cls, folder: Path | str) -> Evaluation:
        """Read what `save` wrote. Raises ArtefactError if it is missing, damaged or not whole."""
        path = Path(folder) / "evaluation.json"
        content = read_json(path, _MADE_BY)
        parts = [*TABLES, "texts", "left_out"]
        if lacking := [part for part in parts if part not in content]:
            raise ArtefactError(
                f"{path} lacks {', '.join(lacking)}: write it again with {_MADE_BY}"
            )
        try:
            tables = {name: _as_frame(content[name], names) for name, names in TABLES.items()}
            texts = {int(number): text for number, text in content["texts"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"{path} is damaged ({error}): write it again with {_MADE_BY}"
            ) from error
        return cls(
            **tables,
            texts=texts,
            left_out=content["left_out"],
            provenance={k: v for k, v in content.items() if k not in parts},
        )

    def _at(
        self, rows: pd.DataFrame, layer: int, method: str | None, split: str | None
    ) -> pd.DataFrame:
        for column, value in (("layer", layer), ("method", method), ("split", split)):
            rows = rows[rows[column] == self._known(column, value)]
        return rows

    def _known(self, column: str, value: Any) -> Any:
        """The value, or the first there is for None. Raises AmygdalaError if it is not there."""
        known = list(dict.fromkeys(self.summary[column].tolist()))
        if value is None:
            return known[0]
        if value not in known:
            why = self.left_out.get(value, "") if column == "split" else ""
            raise AmygdalaError(
                f"{column} {value!r} was not evaluated{f' ({why})' if why else ''}: choose one of "
                f"{', '.join(map(str, known))}"
            )
        return value


def _place(method: str, layer: int) -> str:
    return f"{method} on the embeddings" if layer == EMBEDDING else f"{method} at layer {layer}"


def _as_lists(frame: pd.DataFrame) -> dict[str, list[Any]]:
    return {name: [_plain(value) for value in frame[name].tolist()] for name in frame}


def _plain(value: Any) -> Any:
    """Six digits, as many as float32 holds; None for what JSON has no number for."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _as_frame(columns: dict[str, list[Any]], names: list[str]) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    if absent := [name for name in names if name not in frame]:
        raise ValueError(f"columns {', '.join(absent)} are missing")
    # A column of nothing but None is one of numbers that could not be had.
    empty = [name for name in frame if name not in _TEXT and frame[name].isna().all()]
    return frame.astype(dict.fromkeys(empty, float)) if len(frame) else frame
