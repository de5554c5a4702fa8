"""Live: what a server's requests notice of a training job that runs beside them."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ..errors import AmygdalaError
from .frames import check_frame, check_measured
from .style import BLUE, ORANGE, number, set_suptitle


def served_training(
    scores: pd.DataFrame,
    requests: pd.DataFrame,
    job: tuple[float, float],
    *,
    title: str | None = None,
) -> Figure:
    """A training job as a server's callers see it: its text grows likelier, requests take longer.

    `scores` has `time` and `log_probability`, per token of the trained text (nats), as the server
    answers; `requests` has `start` and `seconds` of all others. `job` is when the job began and
    ended, shaded. All times are in seconds from one zero. Dashes are the median latency before,
    during and after; a request counts where it began. The title says both findings unless one is
    given.

    Raises AmygdalaError for absent columns, no rows, nothing measured, or a job that ends before it
    begins.
    """
    check_frame(scores, "served_training", ["time", "log_probability"])
    check_frame(requests, "served_training", ["start", "seconds"])
    check_measured(scores["log_probability"], "served_training")
    check_measured(requests["seconds"], "served_training")
    began, ended = job
    if not (math.isfinite(began) and began <= ended < math.inf):
        raise AmygdalaError(f"served_training needs when a job began and ended: {job}")
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9.0, 5.4), sharex=True, layout="constrained",
        gridspec_kw={"height_ratios": (1, 1)},
    )  # fmt: skip
    for ax in (top, bottom):
        ax.axvspan(began, ended, color="0.5", alpha=0.15, linewidth=0)
    top.annotate(
        "training", ((began + ended) / 2, 1), xycoords=("data", "axes fraction"),
        xytext=(0, -3), textcoords="offset points", ha="center", va="top", fontsize=9, color="0.35",
    )  # fmt: skip
    curve = scores.sort_values("time")
    top.plot(curve["time"], curve["log_probability"], color=BLUE, marker="o", markersize=4)
    top.set_ylabel("log-probability of the trained\ntext (nats per token)", fontsize=9)
    top.margins(y=0.18)  # room for the word above the curve
    bottom.scatter(requests["start"], requests["seconds"], color=ORANGE, s=14, alpha=0.8)
    spans = {"before": (-math.inf, began), "during": (began, ended), "after": (ended, math.inf)}
    medians = {}
    for when, (start, end) in spans.items():
        seconds = requests.loc[requests["start"].ge(start) & requests["start"].lt(end), "seconds"]
        if len(seconds):
            medians[when] = seconds.median()
            low = max(start, requests["start"].min())
            high = min(end, (requests["start"] + requests["seconds"]).max())
            bottom.hlines(medians[when], low, high, color="0.25", linestyle="--", linewidth=1.2)
    bottom.set_ylabel("time a request took (s)", fontsize=9)
    bottom.set_xlabel("time since the first request was sent (s); dashes are medians", fontsize=9)
    bottom.set_ylim(bottom=0)
    for ax in (top, bottom):
        sns.despine(ax=ax)
    set_suptitle(figure, _finding(curve["log_probability"], medians) if title is None else title)
    return figure


def _finding(likelihood: pd.Series, medians: dict[str, float]) -> str:
    measured = likelihood.dropna()
    first, last = number(measured.iloc[0]), number(measured.iloc[-1])
    times = ", ".join(f"{number(s, signed=False)} s {when}" for when, s in medians.items())
    return f"The trained text goes from {first} to {last} nats per token; a request takes {times}"
