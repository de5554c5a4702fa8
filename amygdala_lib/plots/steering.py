"""Steering: what a sweep of pushes found, over strength, over depth and beside the target."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..errors import AmygdalaError
from .frames import check_frame, check_measured
from .style import (
    BLUE,
    LEGEND_PAD,
    ORANGE,
    RED,
    SEQUENTIAL,
    every,
    layer_name,
    layer_phrase,
    legend_above,
    number,
    readable,
    set_suptitle,
    set_title,
    spread_evenly,
)

GREY = (0.55, 0.55, 0.55)
PANELS = 6
"""More concepts than this share one pair of panels."""
NAMED = 6
"""So many of those that share a panel are named at the end of their lines."""
CELLS = 16
"""Numbers are written into a map of up to so many rows and columns."""
_LOST = {"fill": False, "hatch": "///", "edgecolor": RED, "linewidth": 0}

_DOSE = [
    *("concept", "layer", "strength", "target", "target_low", "target_high", "base"),
    *("random_low", "random_high", "perplexity_ratio", "random_perplexity"),
]


def steering_dose(
    frame: pd.DataFrame, best: pd.DataFrame, *, limit: float = 2.0, title: str | None = None
) -> Figure:
    """Target and perplexity ratio over strength, at the layer that was chosen for each concept.

    `frame` is `SteeringSweep.frame()`, `best` is `SteeringSweep.best()`. The grey band is what
    random pushes of the same length reach, from the least draw to the greatest. Up to `PANELS`
    concepts have panels of their own, with 95% intervals; more share one, the chosen points
    marked, the most and the least steered named. Raises AmygdalaError for absent columns, no rows,
    or a concept of one frame that is not in the other.
    """
    check_frame(frame, "steering_dose", _DOSE)
    check_frame(best, "steering_dose", ["layer", "strength", "steers"], each="concept")
    frame = _held_out(frame)
    if absent := sorted(set(frame["concept"]) ^ set(best.index)):
        raise AmygdalaError(
            f"steering_dose needs the same concepts in both frames: {', '.join(absent)} "
            "are in one of them"
        )
    check_measured(frame["target"], "steering_dose")
    curves = {concept: _curve(frame, concept, best.loc[concept, "layer"]) for concept in best.index}
    if len(curves) <= PANELS:
        figure = _a_panel_each(curves, best, limit)
    else:
        figure = _one_panel(curves, best, limit)
    set_suptitle(figure, _dose_finding(best) if title is None else title)
    return figure


def steering_depth(
    frame: pd.DataFrame, *, limit: float = 2.0, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """The target by layer and strength, the median over concepts; hatched where text suffers.

    `frame` is `SteeringSweep.frame()`, or the rows of one concept of it. A cell is hatched if the
    median perplexity ratio there is above `limit`; the best of the others is framed. Raises
    AmygdalaError for absent columns or no rows.
    """
    check_frame(
        frame, "steering_depth", ["concept", "layer", "strength", "target", "perplexity_ratio"]
    )
    frame = _held_out(frame)
    check_measured(frame["target"], "steering_depth")
    values, ratios = (
        frame.pivot_table(column, "layer", "strength", aggfunc="median", dropna=False)
        for column in ("target", "perplexity_ratio")
    )
    rows, columns = values.shape
    lost = ratios.to_numpy() > limit
    if ax is None:
        size = (max(5.0, 2.2 + 0.62 * columns), max(2.6, 1.7 + 0.38 * min(rows, 14)))
        _, ax = plt.subplots(figsize=size, layout="constrained")
    image = ax.imshow(
        values, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto", interpolation="nearest",
        origin="lower",
    )  # fmt: skip
    for row, column in zip(*np.nonzero(lost), strict=True):
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **_LOST))
    if max(rows, columns) <= CELLS:
        _write_values(ax, values.to_numpy())
    ticks = every(rows, 24)
    ax.set_yticks(range(rows)[ticks], [layer_name(layer) for layer in values.index[ticks]])
    ticks = every(columns, 12)
    ax.set_xticks(range(columns)[ticks], [f"{strength:g}" for strength in values.columns[ticks]])
    ax.tick_params(length=0)
    ax.set(xlabel="strength (mean residual norms)", ylabel="layer", xlim=(-0.5, columns - 0.5),
           ylim=(-0.5, rows - 0.5))  # fmt: skip
    ax.figure.colorbar(image, ax=ax, label="target", fraction=0.06, pad=0.02)
    fluent = values.where(~lost)
    if fluent.notna().to_numpy().any():
        row, column = np.unravel_index(np.nanargmax(fluent.to_numpy()), fluent.shape)
        ax.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.5)
        )
        found = (
            f"Steering works best at {layer_phrase(int(values.index[row]))}, strength "
            f"{values.columns[column]:g}: target {values.iloc[row, column]:.2f}, perplexity "
            f"x{ratios.iloc[row, column]:.2f}"
        )
    else:
        found = f"No push leaves the perplexity ratio below {limit:g}"
    if lost.any():
        legend_above(ax, [Patch(**_LOST, label=f"perplexity ratio above {limit:g}")])
    set_title(ax, found if title is None else title, pad=LEGEND_PAD if lost.any() else None)
    return ax.figure


def side_effects(
    effects: pd.DataFrame, *, most: int = 16, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """What else a push moves: what was pushed toward, and the `most` others that moved farthest.

    `effects` is `SteeringSweep.side_effects(concept)`, of which missing shifts are left out. The
    grey bar behind each is the usual size of a shift under random pushes of the same length.
    Raises AmygdalaError for absent columns or no rows.
    """
    check_frame(effects, "side_effects", ["shift", "random", "target"], each="concept")
    check_measured(effects["shift"], "side_effects")
    effects = effects.dropna(subset="shift")
    size = effects["shift"].abs()
    targets, others = effects[effects["target"]], effects[~effects["target"]]
    shown = others.loc[size[others.index].nlargest(most).index]
    rest = others.drop(shown.index)
    rows = pd.concat([targets, shown.sort_values("shift", ascending=False, kind="stable")])
    if ax is None:
        _, ax = plt.subplots(figsize=(7.5, 1.3 + 0.26 * len(rows)), layout="constrained")
    places = np.arange(len(rows))[::-1]
    chance = rows["random"].fillna(0)
    ax.barh(places, 2 * chance, left=-chance, height=0.86, color="0.88", zorder=0)
    ax.barh(places, rows["shift"], height=0.5, color=[RED if t else BLUE for t in rows["target"]])
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.set_yticks(places, [readable(name) for name in rows.index])
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel="shift of the mean reading (standard deviations)", ylim=(-0.7, len(rows) - 0.3))
    handles = [
        Patch(color=RED, label="pushed toward"),
        Patch(color=BLUE, label="others, the farthest" if len(rest) else "others"),
        Patch(color="0.88", label="usual under random pushes"),
    ]
    legend_above(ax, handles)
    found = _side_finding(targets["shift"], others["shift"], rest["shift"])
    set_title(ax, found if title is None else title, pad=LEGEND_PAD)
    sns.despine(ax=ax, left=True)
    return ax.figure


def _held_out(frame: pd.DataFrame) -> pd.DataFrame:
    """What is reported; all rows if there are no splits."""
    if "split" not in frame:
        return frame
    held_out = frame[frame["split"] == "held_out"]
    return held_out if len(held_out) else frame


def _curve(frame: pd.DataFrame, concept: str, layer: int) -> pd.DataFrame:
    """The cells of one concept at one layer by strength, and that of no push."""
    rows = frame[(frame["concept"] == concept) & (frame["layer"] == layer)]
    base = rows["base"].iloc[0]
    still = dict.fromkeys(
        ("target", "target_low", "target_high", "random_low", "random_high"), base
    ) | {"strength": 0.0, "perplexity_ratio": 1.0, "random_perplexity": 1.0}
    rows = pd.concat([pd.DataFrame([still]), rows[list(still)]])
    return rows.set_index("strength").sort_index()


def _a_panel_each(curves: dict[str, pd.DataFrame], best: pd.DataFrame, limit: float) -> Figure:
    figure, axes = plt.subplots(
        2, len(curves), figsize=(max(6.5, 1.0 + 2.4 * len(curves)), 5.2), sharex=True,
        sharey="row", squeeze=False, layout="constrained", height_ratios=(3, 2),
    )  # fmt: skip
    for (above, below), (concept, curve) in zip(axes.T, curves.items(), strict=True):
        chosen = best.loc[concept, "strength"]
        above.fill_between(
            curve.index, curve["random_low"], curve["random_high"], color="0.88", linewidth=0
        )
        above.fill_between(
            curve.index, curve["target_low"], curve["target_high"], color=BLUE, alpha=0.18,
            linewidth=0,
        )  # fmt: skip
        above.plot(curve["target"], color=BLUE, marker="o", markersize=4)
        below.plot(curve["random_perplexity"], color=GREY, linewidth=1.5)
        below.plot(curve["perplexity_ratio"], color=BLUE, marker="o", markersize=4)
        for ax, column in ((above, "target"), (below, "perplexity_ratio")):
            ax.plot(chosen, curve.loc[chosen, column], **_chosen_mark())
        above.set_title(readable(concept), loc="left", fontsize=10, weight="bold")
    _finish(figure, axes, limit, [Patch(color=BLUE, alpha=0.18, label="95% interval")])
    return figure


def _one_panel(curves: dict[str, pd.DataFrame], best: pd.DataFrame, limit: float) -> Figure:
    figure, axes = plt.subplots(
        2, 1, figsize=(8.5, 6.6), sharex=True, squeeze=False, layout="constrained",
        height_ratios=(3, 2),
    )  # fmt: skip
    above, below = axes[:, 0]
    everything = pd.concat(curves)
    middle = everything.groupby(level=1).median()
    above.fill_between(
        middle.index, middle["random_low"], middle["random_high"], color="0.88", linewidth=0
    )
    faint = {"color": BLUE, "linewidth": 0.7, "alpha": max(0.12, min(0.5, 8 / len(curves)))}
    for concept, curve in curves.items():
        chosen = best.loc[concept, "strength"]
        for ax, column in ((above, "target"), (below, "perplexity_ratio")):
            ax.plot(curve[column], **faint, zorder=1)
            mark = _chosen_mark(small=True)
            ax.plot(chosen, curve.loc[chosen, column], **mark)
    above.plot(middle["target"], color=BLUE, linewidth=2.5, zorder=4)
    below.plot(middle["random_perplexity"], color=GREY, linewidth=1.5, zorder=3)
    below.plot(middle["perplexity_ratio"], color=BLUE, linewidth=2.5, zorder=4)
    _finish(figure, axes, limit, [Line2D([], [], color=BLUE, linewidth=2.5, label="median")])
    ends = pd.Series({concept: curve["target"].iloc[-1] for concept, curve in curves.items()})
    _name_ends(above, ends.dropna(), middle.index[-1])
    return figure


def _chosen_mark(*, small: bool = False) -> dict:
    mark = {"marker": "D", "linestyle": "", "markeredgecolor": "white", "color": ORANGE}
    return mark | {"markersize": 4 if small else 8, "markeredgewidth": 0.5, "zorder": 5}


def _finish(figure: Figure, axes: np.ndarray, limit: float, handles: Sequence) -> None:
    for ax in axes[0]:
        ax.set_ylim(-0.03, 1.03)
        sns.despine(ax=ax)
    for ax in axes[1]:
        ax.set_yscale("log")
        ax.axhline(limit, color=RED, linewidth=1, linestyle=":", zorder=0)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("strength (mean residual norms)", fontsize=9)
        sns.despine(ax=ax)
    low, high = axes[1, 0].get_ylim()
    axes[1, 0].set_ylim(min(low, 0.9), max(high, 1.1 * limit))
    axes[0, 0].set_ylabel("target")
    axes[1, 0].set_ylabel("perplexity ratio")
    figure.legend(
        handles=[
            *handles,
            Line2D([], [], **_chosen_mark(), label="chosen on other prompts"),
            Patch(color="0.82", label="random pushes"),
            Line2D([], [], color=RED, linewidth=1, linestyle=":", label="limit"),
        ],
        loc="outside lower center", ncols=4 if figure.get_figwidth() > 8 else 2, frameon=False,
        fontsize=9,
    )  # fmt: skip


def _name_ends(ax: Axes, ends: pd.Series, strength: float) -> None:
    """The concepts that end highest and lowest, at the right."""
    order = ends.sort_values(ascending=False, kind="stable")
    half = NAMED // 2
    named = order if len(order) <= NAMED else pd.concat([order[:half], order[-half:]])
    low, high = ax.get_ylim()
    places = spread_evenly(named.to_numpy(), 0.055 * (high - low), low, high)
    for (concept, end), place in zip(named.items(), places, strict=True):
        ax.annotate(
            readable(concept), (strength, end), xytext=(1.02, (place - low) / (high - low)),
            textcoords="axes fraction", fontsize=8, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkB": 1},
        )  # fmt: skip


def _write_values(ax: Axes, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value > 0.5 else "black"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)


def _dose_finding(best: pd.DataFrame) -> str:
    steered, n = int(best["steers"].sum()), len(best)
    if n == 1:
        concept, row = next(best.iterrows())
        return f"{readable(concept)[:1].upper()}{readable(concept)[1:]} {row['verdict']}"
    who = {0: f"None of {n} concepts steers", n: f"All {n} concepts steer"}.get(
        steered, f"{steered} of {n} concepts steer{'s' if steered == 1 else ''}"
    )
    if not steered:
        return who
    chosen = best[best["steers"]]
    return (
        f"{who}: median target {chosen['target'].median():.2f} at a perplexity ratio of "
        f"{chosen['perplexity_ratio'].median():.2f}"
    )


def _side_finding(targets: pd.Series, others: pd.Series, rest: pd.Series) -> str:
    pushed = " and ".join(f"{readable(name)} by {number(by)}" for name, by in targets.items())
    found = f"The push moves {pushed}" if len(targets) else "The push"
    if not len(others):
        return found
    farthest = others.abs().idxmax()
    found += (
        f"{',' if len(targets) else ' moves'} {readable(farthest)} by {number(others[farthest])}"
    )
    if len(rest):
        found += f", and {len(rest)} others by {rest.abs().max():.2f} at most"
    return found
