"""Components: what single heads and neurons have to do with a concept."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from ..errors import AmygdalaError
from .frames import check_frame, check_measured
from .style import (
    BLUE,
    GREEN,
    LEGEND_PAD,
    ORANGE,
    colour_scale,
    every,
    hatch_missing,
    layer_phrase,
    legend_above,
    missing_handle,
    number,
    readable,
    set_suptitle,
    set_title,
)

KINDS = {"attention": (0.2, 0.2, 0.2), "GatedDeltaNet": GREEN}
TOP = 10


def head_map(
    values: pd.DataFrame,
    kinds: Sequence[str],
    *,
    title: str | None = None,
    unit: str,
    ax: Axes | None = None,
) -> Figure:
    """One cell per head: layers from top to bottom, heads from left to right, the strongest framed.

    `values` (layers, heads), in `unit`, NaN where a layer has no such head; `kinds[i]` is
    "attention" or "GatedDeltaNet", a strip beside row i. Colours diverge around 0 if any value is
    negative. Raises AmygdalaError for an empty frame, no value at all, or kinds that do not fit.
    """
    check_frame(values, "head_map", each="layer")
    check_measured(values, "head_map")
    kinds = list(kinds)
    _check_kinds(kinds, values)
    array = values.to_numpy(float)
    rows, columns = array.shape
    if ax is None:
        cell = max(0.15, min(0.42, 9 / max(rows, columns)))
        size = (max(5.5, cell * columns + 2.4), cell * rows + 1.7)
        _, ax = plt.subplots(figsize=size, layout="constrained")
    image = ax.imshow(array, aspect="auto", interpolation="nearest", **colour_scale(array))
    signed = bool((array < 0).any())
    hatch_missing(ax)
    row, column = np.unravel_index(np.nanargmax(np.abs(array)), array.shape)
    frame = "black" if signed else ORANGE  # black would be lost on the darkest of one hue
    corner = (column - 0.5, row - 0.5)
    ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=frame, linewidth=1.5, clip_on=False))
    _label_heads(ax, values)
    _draw_kinds(ax, kinds)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03)
    bar.set_label(unit)
    handles = [Patch(color=colour, label=kind) for kind, colour in KINDS.items() if kind in kinds]
    if np.isnan(array).any():
        handles.append(missing_handle("no such head"))
    legend_above(ax, handles)
    if title is None:
        layer, head = values.index[row], values.columns[column]
        title = (
            f"Head {head} of {layer_phrase(layer)} ({kinds[row]}) is the strongest: "
            f"{number(array[row, column], signed=signed)} {unit}"
        )
    set_title(ax, title, pad=LEGEND_PAD)
    return ax.figure


def neuron_bars(frame: pd.DataFrame, concept: str) -> Figure:
    """The ten neurons closest to a direction beside the ten that write most along it.

    `frame` has one row per neuron: `layer`, `neuron`, `cosine` (of the neuron's column of
    down_proj with the direction, signed) and `contribution` (to the projection on the direction,
    positives minus negatives, signed, in units of the residual stream). Neurons in both panels
    have the same colour. A NaN is left out of its panel, which says how many. Raises AmygdalaError
    for absent columns, no rows, a neuron in two rows, or a column without any number.
    """
    check_frame(frame, "neuron_bars", ["layer", "neuron", "cosine", "contribution"])
    neurons = frame.set_index(["layer", "neuron"])[["cosine", "contribution"]].astype(float)
    if not neurons.index.is_unique:
        layer, neuron = neurons.index[neurons.index.duplicated()][0]
        raise AmygdalaError(f"neuron_bars draws a neuron once: {neuron} of layer {layer} is twice")
    for column in neurons:
        check_measured(neurons[column], f"neuron_bars ({column})")
    # nlargest fills up with NaN, which would be bars of no length.
    measured = {column: neurons[column].dropna() for column in neurons}
    top = {c: held.loc[held.abs().nlargest(TOP).index] for c, held in measured.items()}
    both = top["cosine"].index.intersection(top["contribution"].index)
    most = max(map(len, top.values()))
    figure, axes = plt.subplots(
        1, 2, figsize=(9.5, 0.28 * most + 1.9), layout="constrained"
    )  # fmt: skip
    _draw_bars(axes[0], top["cosine"], both, neurons["cosine"].isna().sum())
    axes[0].set_xlabel("cosine of what the neuron writes\nwith the direction")
    axes[0].set_ylabel("layer · neuron")
    _draw_bars(axes[1], top["contribution"], both, neurons["contribution"].isna().sum())
    axes[1].set_xlabel(
        "contribution to the projection, positives minus\nnegatives (residual units)"
    )
    for ax, finding in zip(
        axes, ("closest to the direction", "writing most along it"), strict=True
    ):
        ax.set_title(f"{len(ax.patches)} {finding}", loc="left", fontsize=10)
    if len(both):
        handles = [
            Patch(color=ORANGE, label="in both panels"),
            Patch(color=BLUE, label="in this one only"),
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9
        )
    n = len(top["cosine"])
    share = f"{len(both) or 'None'} of the {n} neurons closest to {readable(concept)}"
    verb = "is" if len(both) <= 1 else "are"
    set_suptitle(
        figure, f"{share} {verb} among the {len(top['contribution'])} that write most along it"
    )
    return figure


def _check_kinds(kinds: Sequence[str], values: pd.DataFrame) -> None:
    problems = []
    if len(kinds) != len(values):
        problems.append(f"head_map got {len(kinds)} kinds for {len(values)} layers")
    if unknown := sorted(set(map(str, kinds)) - set(KINDS)):
        problems.append(f"head_map knows {' and '.join(KINDS)}, not {', '.join(unknown)}")
    if problems:
        raise AmygdalaError("\n".join(problems))


def _label_heads(ax: Axes, values: pd.DataFrame) -> None:
    rows, columns = values.shape
    shown, across = every(rows, 32), every(columns, 16)
    size = 9 if max(rows, columns) <= 32 else 8
    ax.set_yticks(range(rows)[shown], list(values.index[shown]))
    ax.set_xticks(range(columns)[across], list(values.columns[across]))
    ax.tick_params(length=0, labelsize=size)
    ax.tick_params(axis="y", pad=9)  # room for the strip
    ax.set(xlabel="head", ylabel="layer")
    sns.despine(ax=ax, left=True, bottom=True)


def _draw_kinds(ax: Axes, kinds: Sequence[str]) -> None:
    """A strip at the left, as wide at any size of the axes."""
    aside = ax.get_yaxis_transform() + ScaledTranslation(
        -5 / 72, 0, ax.figure.get_figure(root=True).dpi_scale_trans
    )
    for kind, colour in KINDS.items():
        rows = np.flatnonzero(np.array(kinds) == kind)
        ax.vlines(
            np.zeros(len(rows)), rows - 0.5, rows + 0.5, color=colour, linewidth=5,
            transform=aside, clip_on=False,
        )  # fmt: skip


def _draw_bars(ax: Axes, values: pd.Series, both: pd.Index, missing: int) -> None:
    colours = [ORANGE if neuron in both else BLUE for neuron in values.index]
    ax.barh(range(len(values)), values, color=colours, height=0.72)
    ax.axvline(0, color="0.3", linewidth=0.8)
    limit = 1.08 * float(values.abs().max()) or 1.0
    ax.set(xlim=(-limit, limit), ylim=(len(values) - 0.4, -0.6))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_yticks(range(len(values)), [f"{layer} · {neuron}" for layer, neuron in values.index])
    ax.tick_params(axis="y", length=0, labelsize=9)
    if missing:
        ax.set_title(f"{missing} not measured", loc="right", fontsize=9, color="0.4")
    sns.despine(ax=ax, left=True)
