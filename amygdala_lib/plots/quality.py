"""Quality: which directions can be trusted, all concepts at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ..errors import AmygdalaError
from ..quality.report import BUCKETS, REDUNDANT, SINGLE_NEURON, UNRELIABLE
from .frames import check_frame
from .style import BLUE, PALETTE, RED, missing_handle, readable, set_suptitle

COLOURS = dict(zip(BUCKETS, [PALETTE[i] for i in (2, 7, 1, 4, 5)], strict=True))


class Measure(NamedTuple):
    """A column of the figure, on a scale from 0 to 1."""

    label: str
    least: float | None = None
    most: float | None = None

    @property
    def threshold(self) -> float | None:
        return self.most if self.least is None else self.least

    @property
    def condition(self) -> str:
        if self.threshold is None:
            return self.label
        return f"{self.label} {'≤' if self.least is None else '≥'} {self.threshold:g}"

    def fails(self, values: pd.Series) -> pd.Series:
        if self.threshold is None:
            return pd.Series(False, index=values.index)
        return values > self.most if self.least is None else values < self.least


MEASURES = {
    "first_pc_ratio": Measure("first PC ratio"),
    "alignment": Measure("alignment"),
    "reliability": Measure("reliability", least=UNRELIABLE),
    "best_neuron": Measure("best neuron", most=SINGLE_NEURON),
    "neighbour_r2": Measure("neighbour R²", most=REDUNDANT),
    "combination_r2": Measure("combination R²", most=REDUNDANT),
    "head_concentration": Measure("head concentration"),
}
IF_THERE = ("reliability", "neighbour_r2")
"""Columns that a report has and that decide a bucket, but that can do without."""
LANE, GAP, NUMBER = 1.0, 0.36, 0.6
"""Widths along x: of a measure, between two, and of the number of texts."""


def quality_overview(frame: pd.DataFrame, *, by: str = "first_pc_ratio") -> Figure:
    """One row per concept, grouped by bucket, the highest `by` first; one lane per measure.

    `frame` (the index is the concepts; one layer of `QualityReport.to_frame`): `bucket`, `n_texts`
    and, from 0 to 1, `first_pc_ratio`, `alignment`, `best_neuron`, `combination_r2` and
    `head_concentration`; `reliability` and `neighbour_r2` too where there. A value beyond 0 to 1
    is drawn at the edge. NaN, not measured, is hatched. A line marks where a measure's threshold
    is, a diamond a value on its wrong side. Raises AmygdalaError for absent columns, no rows, a
    concept in two rows, an unknown bucket or a `by` that is no measure.
    """
    required = [column for column in MEASURES if column not in IF_THERE]
    check_frame(frame, "quality_overview", ["bucket", "n_texts", *required], each="concept")
    _check_buckets(frame, by)
    measures = _measures(frame)
    n = len(frame)
    columns = 1 if n <= 40 else 2 if n <= 80 else 3
    pages = _pages(frame, by, columns)
    rows = max(map(len, pages))
    size = 8.0 if columns == 1 else 6.5
    width = (1.6 + 0.62 * len(measures)) * size / 8 * columns + 0.6
    figure, axes = plt.subplots(
        1,
        columns,
        figsize=(max(6.5, width), 0.0195 * size * rows + 2.0),
        squeeze=False,
        layout="constrained",
    )
    for ax, page in zip(axes[0], pages, strict=True):
        _draw_page(ax, page, frame, measures, rows, size)
    handles = [
        Line2D([], [], marker="o", color=BLUE, linestyle="", markersize=4, label="value, 0 to 1"),
        Line2D([], [], color="0.35", linewidth=0.9, label="threshold"),
        Line2D(
            [], [], marker="D", color=RED, linestyle="", markersize=4, label="on its wrong side"
        ),
    ]
    if frame[list(measures)].isna().to_numpy().any():
        handles.append(missing_handle("not measured"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8
    )
    set_suptitle(figure, _bucket_finding(frame["bucket"]))
    return figure


def _check_buckets(frame: pd.DataFrame, by: str) -> None:
    problems = []
    for concept, bucket in frame["bucket"][~frame["bucket"].isin(list(BUCKETS))].items():
        problems.append(f"{concept} is in bucket {bucket!r}: there are {', '.join(BUCKETS)}")
    can_order = ["n_texts", *_measures(frame)]
    if by not in can_order:
        problems.append(f"quality_overview cannot order by {by!r}: choose {', '.join(can_order)}")
    if problems:
        raise AmygdalaError("\n".join(problems))


def _measures(frame: pd.DataFrame) -> dict[str, Measure]:
    found = {column: MEASURES[column] for column in MEASURES if column in frame}
    if "neighbour_r2" in found:  # which decides on redundancy then: see quality.combinations
        found["combination_r2"] = Measure(found["combination_r2"].label)
    return found


def _bucket_finding(buckets: pd.Series) -> str:
    counts, n = buckets.value_counts(), len(buckets)
    clean = int(counts.get("clean", 0))
    others = counts.drop("clean", errors="ignore")
    if others.empty:
        return f"All {n} directions are clean"
    verb = "is" if clean <= 1 else "are"
    listed = ", ".join(f"{count} {bucket}" for bucket, count in others.items())
    return f"{clean or 'None'} of {n} directions {verb} clean; of the others, {listed}"


def _pages(frame: pd.DataFrame, by: str, columns: int) -> list[list[tuple[str, bool]]]:
    """What stands in each column of rows: (text, False) heads a bucket, (concept, True) is one."""
    groups = {
        bucket: frame[frame["bucket"] == bucket].sort_values(by, ascending=False, kind="stable")
        for bucket in BUCKETS
    }
    capacity = -(-len(frame) // columns)
    while True:
        pages: list[list[tuple[str, bool]]] = [[]]
        for bucket, group in groups.items():
            for i, concept in enumerate(group.index):
                # A heading never stands alone at the foot.
                if len(pages[-1]) + (2 if i == 0 else 1) > capacity:
                    pages.append([])
                if i == 0:
                    pages[-1].append((f"{bucket} ({len(group)})", False))
                elif not pages[-1]:
                    pages[-1].append((f"{bucket} (continued)", False))
                pages[-1].append((concept, True))
        if len(pages) <= columns:
            return pages + [[] for _ in range(columns - len(pages))]
        capacity += 1


def _draw_page(
    ax: Axes,
    page: Sequence[tuple[str, bool]],
    frame: pd.DataFrame,
    measures: dict[str, Measure],
    rows: int,
    size: float,
) -> None:
    at = {concept: row for row, (concept, is_concept) in enumerate(page) if is_concept}
    own, y = frame.loc[list(at)], np.array(list(at.values()), dtype=float)
    starts = {column: i * (LANE + GAP) for i, column in enumerate(measures)}
    for column, measure in measures.items():
        _draw_lane(ax, starts[column], measure, own[column].astype(float), y, size)
        ax.text(
            starts[column] + 0.4, -0.9, measure.condition,
            rotation=55, rotation_mode="anchor", ha="left", va="bottom", fontsize=size,
        )  # fmt: skip
    numbers = -GAP
    ax.text(
        numbers - 0.2, -0.9, "texts", rotation=55, rotation_mode="anchor",
        ha="left", va="bottom", fontsize=size,
    )  # fmt: skip
    for concept, row in at.items():
        count = own.loc[concept, "n_texts"]
        known = "?" if pd.isna(count) else f"{count:.0f}"
        ax.text(numbers, row, known, ha="right", va="center", fontsize=size, color="0.35")
    bucket = ""
    for row, (text, is_concept) in enumerate(page):
        bucket = bucket if is_concept else text.split(" (")[0]
        ax.text(
            numbers - NUMBER, row, readable(text), ha="right", va="center", fontsize=size,
            color="black" if is_concept else COLOURS[bucket],
            weight="normal" if is_concept else "bold",
        )  # fmt: skip
    ends = [x for start in starts.values() for x in (start, start + LANE)]
    ax.set_xticks(ends, ["0", "1"] * len(starts), fontsize=size - 1)
    ax.set_yticks([])
    ax.tick_params(length=2, width=0.5)
    ax.set(xlim=(numbers, ends[-1] + 0.1), ylim=(rows - 0.4, -0.6))
    ax.spines[:].set_visible(False)


def _draw_lane(
    ax: Axes, start: float, measure: Measure, values: pd.Series, y: np.ndarray, size: float
) -> None:
    missing = values.isna().to_numpy()
    ax.add_collection(_bars(start, y[~missing], facecolor="0.94"))
    hatched = {"facecolor": "0.97", "edgecolor": "0.75", "hatch": "//////"}
    ax.add_collection(_bars(start, y[missing], **hatched))
    if measure.threshold is not None and len(y):
        x = start + LANE * measure.threshold
        ax.vlines(x, y.min() - 0.5, y.max() + 0.5, color="0.35", linewidth=0.9, zorder=1)
    x = start + LANE * values.clip(0, 1).to_numpy()
    wrong = measure.fails(values).to_numpy()
    dots = {"s": (0.5 * size) ** 2, "linewidth": 0, "zorder": 2, "clip_on": False}
    ax.scatter(x[~wrong & ~missing], y[~wrong & ~missing], color=BLUE, marker="o", **dots)
    ax.scatter(x[wrong], y[wrong], color=RED, marker="D", **dots | {"s": (0.42 * size) ** 2})


def _bars(start: float, y: np.ndarray, **look: str) -> PatchCollection:
    """The empty lanes; one collection, since 200 concepts have 1400 of them."""
    patches = [Rectangle((start, row - 0.36), LANE, 0.72) for row in y]
    return PatchCollection(patches, linewidth=0, zorder=0, **look)
