"""Style: the colours, names and titles that all figures share."""

from __future__ import annotations

import colorsys
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy.optimize import isotonic_regression

DIVERGING = "RdBu_r"
SEQUENTIAL = "mako_r"
MANY = 60
"""Above this many concepts, clusters or a subset are labelled instead of every concept."""

LEGEND_PAD = 22
"""Points between axes and title, for one line of legend."""

Colour = tuple[float, float, float]
PALETTE: list[Colour] = sns.color_palette("colorblind")
BLUE, ORANGE, GREEN, RED = PALETTE[:4]


def readable(name: str) -> str:
    return str(name).replace("_", " ")


def layer_name(layer: int) -> str:
    return "embed" if layer < 0 else str(layer)


def layer_phrase(layer: int) -> str:
    """As `layer_name`, within a sentence."""
    return "the embeddings" if layer < 0 else f"layer {layer}"


def number(value: float, *, signed: bool = True) -> str:
    """Two digits after the point, more where that would round to nothing: +0.42, -3.1e-05."""
    form = ".1e" if 0 < abs(value) < 0.01 else ".2f"
    return format(value, f"+{form}" if signed else form)


def wrapped(title: str, width: int = 80) -> str:
    """In as few lines as fit the width, all about as long."""
    lines = textwrap.wrap(title, width, break_on_hyphens=False)
    for narrower in range(-(-len(title) // max(1, len(lines))), width):
        balanced = textwrap.wrap(title, narrower, break_on_hyphens=False)
        if len(balanced) <= len(lines):
            return "\n".join(balanced)
    return "\n".join(lines)


def set_title(ax: Axes, title: str, *, pad: float | None = None) -> None:
    """A title at the left, in lines no wider than the axes (but 40 characters in any case)."""
    inches = ax.get_position().width * ax.figure.get_figure(root=True).get_figwidth()
    ax.set_title(wrapped(title, max(40, int(11.5 * inches))), loc="left", pad=pad)


def set_suptitle(figure: Figure, title: str) -> None:
    """A title over all panels, in lines no wider than the figure."""
    figure.suptitle(wrapped(title, int(11.5 * figure.get_figwidth())), x=0.01, ha="left")


def colour_scale(values: np.ndarray) -> dict[str, str | float]:
    """`cmap`, `vmin` and `vmax`: diverging around 0 if any value is negative, else up from 0."""
    limit = float(np.nanmax(np.abs(values))) or 1.0
    if np.nanmin(values) < 0:
        return {"cmap": DIVERGING, "vmin": -limit, "vmax": limit}
    return {"cmap": SEQUENTIAL, "vmin": 0.0, "vmax": limit}


def hatch_missing(ax: Axes) -> None:
    """Hatch what is behind an image: what it has no value for looks like none of its colours."""
    ax.set_facecolor("0.94")
    ax.patch.set(hatch="//////", edgecolor="0.75", linewidth=0)


def missing_handle(label: str) -> Patch:
    return Patch(facecolor="0.94", edgecolor="0.75", hatch="//////", linewidth=0, label=label)


def legend_above(ax: Axes, handles: Sequence[Artist]) -> None:
    """Between title and axes; the title needs `LEGEND_PAD`."""
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles),
        frameon=False, fontsize=9, borderaxespad=0.2, borderpad=0.2,
    )  # fmt: skip


def every(count: int, most: int) -> slice:
    """The even step through `count` things that takes at most `most` of them, to be labelled."""
    return slice(None, None, max(1, -(-count // most)))


def darkened(colour: Colour) -> Colour:
    """Dark enough for text on white."""
    lightness = colorsys.rgb_to_hls(*colour)[1]
    return sns.set_hls_values(colour, l=min(lightness, 0.38))


def cluster_colours(clusters: Sequence[str]) -> dict[str, Colour]:
    names = sorted(set(clusters))
    palette = PALETTE
    if len(names) > len(palette):  # neighbours on the hue circle differ in lightness too
        light, dark = sns.husl_palette(len(names), l=0.72), sns.husl_palette(len(names), l=0.42)
        palette = [(light, dark)[i % 2][i] for i in range(len(names))]
    return dict(zip(names, palette, strict=False))


def cluster_handles(colours: Mapping[str, Colour]) -> list[Patch]:
    return [Patch(color=colour, label=readable(name)) for name, colour in colours.items()]


def spread_evenly(
    wanted: Float[np.ndarray, " n"], gap: float, low: float, high: float
) -> Float[np.ndarray, " n"]:
    """Places nearest to the wanted ones (least squares) that lie `gap` apart, within low to high.

    If the range is too short for all, the gap shrinks.
    """
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(wanted))
    # With the gaps taken out, the places only have to ascend.
    ascending = isotonic_regression(np.asarray(wanted, float)[order] - steps).x
    places = np.empty(len(wanted))
    places[order] = np.clip(ascending, low, high - steps[-1]) + steps
    return places
