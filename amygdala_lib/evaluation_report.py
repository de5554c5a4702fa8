"""A page that shows an evaluation: what was measured, how, and where it fails."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from . import plots
from .artefacts import replacing
from .evaluate import Evaluation, Recommendation
from .models import EMBEDDING

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: .85rem; } th, td { padding: .2rem .6rem; }
th { text-align: left; border-bottom: 1px solid #999; } td { border-bottom: 1px solid #eee; }
img { max-width: 100%; } .said { font-size: 1.05rem; }
"""


def write_report(evaluation: Evaluation, path: Path | str, *, split: str | None = None) -> Path:
    """Write one HTML page without any outside part: it can be attached to a paper, or printed.

    Everything is of the method and layer that `evaluation.recommend(split)` names. Returns the
    path. Raises AmygdalaError for a split that was not evaluated.
    """
    best = evaluation.recommend(split)
    path = Path(path)
    page = "\n".join(_sections(evaluation, best))
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _sections(evaluation: Evaluation, best: Recommendation) -> list[str]:
    origin = evaluation.provenance
    here = {"method": best.method, "layer": best.layer, "split": best.split}
    concepts = _rows(evaluation.concepts, here)
    of_split = _rows(evaluation.summary, {"split": best.split})
    chosen = _rows(evaluation.summary, {"method": best.method, "layer": best.layer})
    nulls = _rows(evaluation.nulls, here)
    random = nulls[nulls["kind"] == "random directions"].iloc[0]
    title = f"Concept directions of {origin.get('model', 'a model')}, validated"
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
        f"<p class='said'>{html.escape(str(best))}.</p>",
        f"<p>{html.escape(_method_text(evaluation, best))}</p>",
        "<h2>Method and layer</h2>",
        _picture(plots.method_by_layer(of_split)),
        "<h2>Every split, beside words and embeddings</h2>",
        _table(chosen.set_index("split")[_present(chosen)]),
        "<h2>Nulls</h2>",
        "<p>Where every text has one concept, a direction's AUROCs average 0.5 over concepts by "
        "construction: look at how far a single AUROC strays, and at shuffled labels.</p>",
        _table(
            nulls.set_index("kind")[["draws", "mean", "low", "high", "single_low", "single_high"]]
        ),
        "<h2>Concept by concept</h2>",
        _picture(plots.auroc_forest(concepts, null=(random["single_low"], random["single_high"]))),
        "<h2>Where it fails</h2>",
        _twins(evaluation, best),
    ]
    confusion = evaluation.cluster_confusion(best.layer, best.method, best.split)
    if len(confusion) > 1:
        parts += ["<h2>Clusters</h2>", _picture(plots.cluster_confusion(confusion))]
    hard = _rows(evaluation.hard, {"method": best.method, "layer": best.layer})
    if len(hard):
        parts += ["<h2>Hard negatives</h2>", _picture(plots.hard_negatives(hard))]
    parts += ["<h2>Made with</h2>", _table(pd.Series(_facts(origin), name="").to_frame())]
    return parts


def _method_text(evaluation: Evaluation, best: Recommendation) -> str:
    origin = evaluation.provenance
    left_out = "".join(f" No split {name!r}: {why}." for name, why in evaluation.left_out.items())
    if EMBEDDING not in evaluation.summary["layer"].to_numpy():
        left_out += " Not compared with the embeddings: they are layer -1, which was not captured."
    return (
        f"Directions are extracted anew for every fold; nothing is computed from the texts that "
        f"are tried. Intervals are 95%, of {origin.get('draws')} bootstrap samples; p-values are "
        f"against as many random directions and against labels dealt out at random, the larger of "
        f"the two after Benjamini-Hochberg over {best.n_concepts} concepts. The best of several "
        f"methods and layers is best by luck too: expect a little less on new texts.{left_out}"
    )


def _twins(evaluation: Evaluation, best: Recommendation) -> str:
    twins = evaluation.twins(best.layer, best.method, best.split).head(12)
    if twins.empty:
        return "<p>Every text of every concept is recognised.</p>"
    rows = twins.assign(text=[examples[0] for examples in twins["examples"]])
    return _table(rows.drop(columns="examples"))


def _facts(origin: dict) -> dict[str, str]:
    shown = ("model", "revision", "weight_hash", "corpus_hash", "layers", "pool", "methods",
             "folds", "draws", "repeats", "seed", "versions")  # fmt: skip
    return {name: str(origin[name]) for name in shown if name in origin}


def _present(summary: pd.DataFrame) -> list[str]:
    wanted = ("median_auroc", "median_low", "median_high", "embedding_median_auroc",
              "words_median_auroc", "top1", "top5", "family", "significant")  # fmt: skip
    return [name for name in wanted if name in summary and summary[name].notna().any()]


def _rows(frame: pd.DataFrame, values: dict[str, object]) -> pd.DataFrame:
    """Rows with these values; a null that holds for any method stays."""
    for name, value in values.items():
        if name in frame:
            frame = frame[frame[name].isin([value, "any"] if name == "method" else [value])]
    return frame


def _table(frame: pd.DataFrame) -> str:
    frame = frame.rename_axis(None).rename(columns=lambda name: str(name).replace("_", " "))
    return frame.to_html(float_format="{:.3f}".format, border=0, na_rep="")


def _picture(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    data = base64.b64encode(stream.getvalue()).decode()
    return f"<img alt='' src='data:image/png;base64,{data}'>"
