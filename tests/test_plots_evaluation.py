"""Figures of an evaluation show its numbers, say what they mean, and can be read."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.text import Text
from test_evaluate import quick, world

from amygdala_lib import AmygdalaError, plots
from amygdala_lib.evaluate import Evaluation
from amygdala_lib.plots.style import BLUE, RED

CLUSTERS = ["fear", "anger", "disgust", "sadness", "self_regard", "joy", "warmth", "low_energy"]


pytestmark = pytest.mark.usefixtures("quiet_figures")


def named(n):
    longest = ["anticipatory_grief", "torschlusspanik", "self_conscious", "l_appel_du_vide"]
    return (longest + [f"concept_{i}" for i in range(n)])[:n]


def concept_rows(n):
    rng = np.random.default_rng(0)
    auroc, half = np.clip(rng.normal(0.82, 0.13, n), 0.35, 0.995), rng.uniform(0.03, 0.12, n)
    frame = pd.DataFrame({"method": "pooled", "layer": 12, "split": "heldout"}, range(n))
    return frame.assign(
        concept=named(n),
        auroc=auroc,
        auroc_low=np.clip(auroc - half, 0, 1),
        auroc_high=np.clip(auroc + half, 0, 1),
        significant=auroc > 0.66,
        embedding_auroc=np.clip(auroc - 0.1 + rng.normal(0, 0.06, n), 0, 1),
        words_auroc=rng.uniform(0.45, 0.75, n),
    )


def confusion(n):
    rng = np.random.default_rng(0)
    names = (CLUSTERS + [f"cluster_{i}" for i in range(n)])[:n]
    counts = rng.poisson(1.2, (n, n)) + np.diag(rng.integers(5, 60, n))
    return pd.DataFrame(counts, names, names)


def summaries(methods, layers):
    rng = np.random.default_rng(0)
    rows = [(f"method_{i}", layer, "heldout") for i in range(methods) for layer in layers]
    frame = pd.DataFrame(rows, columns=["method", "layer", "split"])
    return frame.assign(median_auroc=rng.uniform(0.55, 0.95, len(rows)))


def hard_rows():
    rows = [("negated", 40, 0.55), ("mentioned", 44, 0.71), ("observed", 1, 0.86)]
    frame = pd.DataFrame(rows, columns=["kind", "n_hard", "auroc"])
    frame = frame.assign(method="pooled", layer=12, ordinary_auroc=0.93)
    for of in ("auroc", "ordinary_auroc"):
        frame[f"{of}_low"], frame[f"{of}_high"] = frame[of] - 0.06, frame[of] + 0.06
    return frame


RANGES = [
    np.geomspace(1, 1e4, 9).round(),
    np.linspace(0, 40, 10),
    np.append(0, np.geomspace(1, 3e6, 8).round()),
    np.arange(36, 43, 0.7),
]


def curves(scenarios, concepts):
    """Every second concept should fall; nothing is expected of every fifth scenario."""
    rng = np.random.default_rng(0)
    first = "minutes_a_child_is_late_from_school_on_an_evening_in_winter"
    rows = [
        (
            f"scenario_{i}" if i else first,
            concept,
            dose,
            sign * step * 0.3 + rng.normal(0, 0.4),
            sign,
        )
        for i in range(scenarios)
        for k, concept in enumerate(named(concepts))
        for sign in [0 if i % 5 == 4 else (-1) ** k]
        for step, dose in enumerate(RANGES[i % 4])
    ]
    return pd.DataFrame(rows, columns=["scenario", "concept", "dose", "score", "expected"])


DRAWN = {
    "auroc_forest": lambda n: plots.auroc_forest(concept_rows(n), null=(0.44, 0.56)),
    "cluster_confusion": lambda n: plots.cluster_confusion(confusion(8 if n == 20 else 40)),
    "method_by_layer": lambda n: plots.method_by_layer(
        summaries(*((3, range(-1, 8)) if n == 20 else (9, range(-1, 64))))
    ),
    "hard_negatives": lambda n: plots.hard_negatives(hard_rows()),
    "dose_curves": lambda n: plots.dose_curves(curves(*((12, 4) if n == 20 else (5, 40)))),
}


def texts_drawn(figure):
    """Every text that is drawn, tick labels within the limits included."""
    legends = list(figure.legends)
    found = [*figure.texts]
    for ax in (ax for ax in figure.axes if ax.get_visible()):
        found += [*ax.texts, ax.xaxis.label, ax.yaxis.label, ax._left_title]
        legends += [ax.get_legend()] if ax.get_legend() else []
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False):
                found += [label] if low <= place <= high else []
    found += [text for legend in legends for text in legend.get_texts()]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("name", DRAWN)
def test_no_text_lies_on_another(name, n):
    figure = DRAWN[name](n)
    figure.draw_without_rendering()
    texts = texts_drawn(figure)
    boxes = np.array([Text.get_window_extent(text).padded(-1).extents for text in texts])
    low, high = boxes[:, None, :2], boxes[None, :, 2:]
    meet = (low < high).all(-1) & (low < high).all(-1).T & ~np.eye(len(texts), dtype=bool)
    pairs = [(texts[i].get_text(), texts[j].get_text()) for i, j in np.argwhere(meet) if i < j]
    assert pairs == []


def title(figure):
    return " ".join((figure.get_suptitle() or figure.axes[0].get_title(loc="left")).split())


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def points(figure):
    """Of a forest: (x, y, whether filled) of every concept, panels one under the other."""
    found = []
    for ax in figure.axes:
        for collection in [c for c in ax.collections if hasattr(c, "get_sizes")][:2]:
            filled = to_hex(collection.get_facecolor()[0]) != "#ffffff"
            found += [(x, y, filled) for x, y in collection.get_offsets().tolist()]
    return found


@pytest.mark.parametrize(("n", "panels"), [(20, 1), (60, 1), (61, 2), (200, 3)])
def test_every_concept_has_its_row_and_the_best_are_first(n, panels):
    rows = concept_rows(n)
    figure = plots.auroc_forest(rows)
    order = rows.sort_values("auroc", ascending=False, kind="stable")["concept"].str.replace(
        "_", " "
    )
    assert len(figure.axes) == panels
    assert [name for ax in figure.axes for name in labels(ax.yaxis)] == list(order)
    assert sorted(x for x, _, _ in points(figure)) == pytest.approx(sorted(rows["auroc"]))


def test_concepts_that_are_not_significant_are_hollow():
    rows = concept_rows(20).assign(significant=[False] * 3 + [True] * 17)
    hollow = sorted(x for x, _, filled in points(plots.auroc_forest(rows)) if not filled)
    assert hollow == pytest.approx(sorted(rows["auroc"][:3]))


def test_intervals_are_as_long_as_the_frame_says():
    rows = concept_rows(20).sort_values("auroc", ascending=False)
    lines = plots.auroc_forest(rows).axes[0].collections[0].get_segments()
    assert np.array(lines)[:, :, 0] == pytest.approx(rows[["auroc_low", "auroc_high"]].to_numpy())


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_baselines_are_drawn_where_they_are_there():
    rows = concept_rows(20)
    assert {"bag of words", "same method on the embeddings"} < set(legend(plots.auroc_forest(rows)))
    bare = rows.drop(columns="words_auroc").assign(embedding_auroc=np.nan)
    assert not {"bag of words", "same method on the embeddings"} & set(
        legend(plots.auroc_forest(bare))
    )


def test_at_the_embeddings_the_embeddings_are_no_baseline():
    rows = concept_rows(5).assign(layer=-1)
    figure = plots.auroc_forest(rows)
    assert "same method on the embeddings" not in legend(figure)
    assert "the embeddings" in figure.axes[0].get_xlabel()


def test_the_null_is_a_band():
    ax = plots.auroc_forest(concept_rows(20), null=(0.44, 0.56)).axes[0]
    (band,) = ax.patches
    assert (band.get_x(), band.get_width()) == pytest.approx((0.44, 0.12))


def test_the_forest_says_how_many_do_better_than_chance():
    rows = concept_rows(4).assign(auroc=[0.5, 0.6, 0.8, 0.9], significant=[False, True, True, True])
    rows = rows.assign(embedding_auroc=[0.4, 0.7, 0.7, 0.7], words_auroc=[0.4, 0.4, 0.85, np.nan])
    assert title(plots.auroc_forest(rows)) == (
        "3 of 4 concepts do significantly better than chance (median AUROC 0.70, from anticipatory "
        "grief 0.50 to l appel du vide 0.90); 2 above the embeddings and the bag of words"
    )
    assert title(plots.auroc_forest(rows.assign(significant=False))).startswith("None of 4")
    assert title(plots.auroc_forest(rows, title="My own")) == "My own"


def test_concepts_without_an_auroc_are_left_out_and_counted():
    rows = concept_rows(20)
    rows.loc[[3, 4], ["auroc", "auroc_low", "auroc_high"]] = np.nan
    figure = plots.auroc_forest(rows)
    assert len(points(figure)) == 18
    assert "2 of 20 concepts not measured" in figure.axes[0].get_xlabel()


def test_the_confusion_shows_shares_of_rows_and_writes_the_counts():
    counts = pd.DataFrame([[6, 2], [1, 9]], ["fear", "joy"], ["fear", "joy"])
    ax = plots.cluster_confusion(counts).axes[0]
    assert labels(ax.yaxis) == ["joy (10)", "fear (8)"] and labels(ax.xaxis) == ["joy", "fear"]
    assert np.allclose(ax.images[0].get_array(), [[0.9, 0.1], [0.25, 0.75]])
    assert {t.get_position(): t.get_text() for t in ax.texts} == {
        (0, 0): "9", (1, 0): "1", (0, 1): "2", (1, 1): "6",
    }  # fmt: skip


def test_columns_in_another_order_than_rows_are_put_right():
    counts = confusion(8)
    other = counts[counts.columns[::-1]]
    first, second = plots.cluster_confusion(counts), plots.cluster_confusion(other)
    assert np.allclose(first.axes[0].images[0].get_array(), second.axes[0].images[0].get_array())
    assert title(first) == title(second)


def test_the_confusion_names_the_most_frequent_one():
    counts = pd.DataFrame(np.diag([8, 8, 4]), CLUSTERS[:3], CLUSTERS[:3])
    assert title(plots.cluster_confusion(counts)) == (
        "100% of 20 texts are recognised as of their cluster"
    )
    counts.loc["anger", "fear"], counts.loc["fear", "disgust"] = 4, 1
    assert title(plots.cluster_confusion(counts)) == (
        "80% of 25 texts are recognised as of their cluster; the most frequent confusion: anger "
        "taken for fear (4 texts)"
    )


def test_a_cluster_without_texts_is_hatched_and_last():
    counts = confusion(4)
    counts.iloc[0] = 0
    ax = plots.cluster_confusion(counts).axes[0]
    assert labels(ax.yaxis)[-1] == "fear (0)"
    assert np.ma.getmaskarray(ax.images[0].get_array())[-1].all() and ax.patch.get_hatch()


def test_cells_too_small_for_numbers_have_none():
    figure, ax = plt.subplots(figsize=(2.5, 2.5))
    assert plots.cluster_confusion(confusion(30), ax=ax) is figure and not ax.texts


def written(ax):
    return {(round(t.get_position()[0]), t.get_position()[1]): t.get_text() for t in ax.texts}


def framed(ax):
    return [patch for patch in ax.patches if patch.get_fill() is False]


@pytest.mark.parametrize(("methods", "layers"), [(1, [4]), (3, range(-1, 8)), (9, range(-1, 64))])
def test_every_value_is_in_its_cell_and_the_best_is_framed(methods, layers):
    frame = summaries(methods, layers)
    ax = plots.method_by_layer(frame).axes[0]
    assert sorted(float(t.get_text()) for t in ax.texts) == sorted(frame["median_auroc"].round(2))
    (frame_of_best,) = framed(ax)
    best = frame[frame["layer"] >= 0]["median_auroc"].max()
    x, y = frame_of_best.get_xy()
    (inside,) = [t for t in ax.texts if np.allclose(t.get_position(), (x + 0.5, y + 0.5))]
    assert float(inside.get_text()) == round(best, 2)


def test_the_embeddings_stand_apart_and_are_not_the_best():
    frame = summaries(2, range(-1, 4))
    frame.loc[frame["layer"] == -1, "median_auroc"] = 0.99
    frame.loc[frame["layer"] == 2, "median_auroc"] = [0.96, 0.97]
    figure = plots.method_by_layer(frame)
    ax = figure.axes[0]
    ticks = dict(zip(labels(ax.xaxis), ax.get_xticks(), strict=True))
    assert ticks["0"] - ticks["embed"] > 1 and ticks["1"] - ticks["0"] == pytest.approx(1)
    assert title(figure) == (
        "method 1 at layer 2 is best on the split heldout: median AUROC 0.97; 0.99 on the "
        "embeddings"
    )


def test_with_the_embeddings_alone_the_best_is_among_them():
    figure = plots.method_by_layer(summaries(3, [-1]))
    assert len(framed(figure.axes[0])) == 1 and "at the embeddings is best" in title(figure)


def test_without_the_embeddings_the_runner_up_is_named():
    frame = summaries(2, [3, 4]).assign(median_auroc=[0.6, 0.7, 0.9, 0.8])
    assert title(plots.method_by_layer(frame)).endswith(
        "median AUROC 0.90, before method 1 at layer 4 (0.80)"
    )


def test_another_column_can_be_shown_and_a_gap_is_hatched():
    frame = summaries(2, range(4)).rename(columns={"median_auroc": "top1"})
    frame.loc[2, "top1"] = np.nan
    figure = plots.method_by_layer(frame, value="top1")
    assert len(figure.axes[0].texts) == 7 and "top1" in title(figure)
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "not measured"


def test_hard_negatives_stand_beside_ordinary_ones_with_their_intervals():
    ax = plots.hard_negatives(hard_rows()).axes[0]
    hard, ordinary = (line for line in ax.lines if len(line.get_xdata()) == 3)
    assert hard.get_ydata() == pytest.approx([0.55, 0.71, 0.86])
    assert ordinary.get_ydata() == pytest.approx([0.93] * 3)
    assert (hard.get_xdata() < ordinary.get_xdata()).all()
    ends = np.array(ax.collections[0].get_segments())[:, :, 1]
    assert ends == pytest.approx(hard_rows()[["auroc_low", "auroc_high"]].to_numpy())
    assert labels(ax.xaxis) == [
        "negated\n(40 texts)",
        "mentioned\n(44 texts)",
        "observed\n(1 text)",
    ]


def test_the_hardest_kind_is_in_the_title():
    rows = hard_rows()
    start = "Negated texts are the hardest to tell apart: AUROC "
    assert title(plots.hard_negatives(rows)) == (
        f"{start}0.55, which may be chance, and 0.93 against ordinary texts"
    )
    rows.loc[0, ["auroc", "auroc_low", "auroc_high"]] = [0.65, 0.6, 0.7]
    assert title(plots.hard_negatives(rows)) == f"{start}0.65, and 0.93 against ordinary texts"
    rows.loc[0, ["auroc", "auroc_low", "auroc_high"]] = [0.3, 0.2, 0.4]
    assert "below chance" in title(plots.hard_negatives(rows))


def panel_labels(figure):
    return [[t.get_text() for t in ax.get_legend().get_texts()] for ax in figure.axes]


def one_curve(scores, doses=None, **columns):
    doses = np.arange(len(scores)) if doses is None else doses
    frame = pd.DataFrame({"scenario": "late", "concept": "afraid", "dose": doses, "score": scores})
    return frame.assign(**columns)


def test_a_panel_per_scenario_with_rho_as_scipy_has_it():
    frame = curves(3, 1)
    figure = plots.dose_curves(frame)
    assert len(figure.axes) == 3
    for (label,), (_, own) in zip(
        panel_labels(figure), frame.groupby("scenario", sort=False), strict=True
    ):
        assert f"ρ = {spearmanr(own['dose'], own['score']).statistic:+.2f}" in label


def test_p_is_of_all_orders_of_few_points_and_of_one_side_where_that_is_expected():
    scores = [0.1, 0.3, 0.2, 0.5]  # rho 0.8: 4 of the 24 orders correlate as highly
    assert panel_labels(plots.dose_curves(one_curve(scores, expected=1))) == [
        ["afraid: ρ = +0.80, p = 0.17"]
    ]
    assert "p = 0.33" in panel_labels(plots.dose_curves(one_curve(scores)))[0][0]
    assert "p = 0.96" in panel_labels(plots.dose_curves(one_curve(scores, expected=-1)))[0][0]


def test_p_of_many_points_is_near_the_exact_one():
    scores = np.random.default_rng(5).normal(size=40) + np.arange(40) / 40
    shown = panel_labels(plots.dose_curves(one_curve(scores)))[0][0]
    expected = spearmanr(range(40), scores).pvalue
    assert float(shown.split("p = ")[1]) == pytest.approx(expected, abs=0.01)


def test_doses_that_span_much_are_on_a_log_scale():
    scales = [ax.get_xscale() for ax in plots.dose_curves(curves(4, 1)).axes]
    assert scales == ["log", "linear", "symlog", "linear"]  # in the third is a dose of 0


def test_the_colour_tells_what_is_expected():
    frame = curves(5, 2)
    axes = plots.dose_curves(frame).axes
    colours = [line.get_color() for line in axes[0].get_legend().get_lines()]
    assert colours == [RED, BLUE]
    assert len({line.get_color() for line in axes[4].get_legend().get_lines()} - {RED, BLUE}) == 1
    same = plots.dose_curves(frame.assign(expected=frame["expected"].replace(0, np.nan)))
    assert title(same) == title(plots.dose_curves(frame))


def test_of_many_concepts_the_strongest_are_named():
    figure = plots.dose_curves(curves(1, 40))
    (held,) = panel_labels(figure)
    assert len(held) == 6 and held[-1] == "35 others, less strongly"
    assert sum(
        isinstance(line, Line2D) and line.get_alpha() == 0.2 for line in figure.axes[0].lines
    )


def test_the_title_counts_what_moves_as_expected():
    up, flat = np.arange(8.0), [0, 1, 0, 1, 0, 1, 0, 1]
    rising = one_curve(up, expected=1)
    against = one_curve(up, expected=-1).assign(scenario="b")
    control = one_curve(flat, expected=0).assign(scenario="c")
    assert (
        title(plots.dose_curves(rising)) == "The score moves with the dose as expected (p < 0.05)"
    )
    assert title(plots.dose_curves(pd.concat([rising, against, control]))) == (
        "1 of 2 scores moves with the dose as expected (p < 0.05); of 1 where nothing is expected "
        "none moves"
    )
    assert title(plots.dose_curves(against)).startswith("The score does not move")


def test_a_curve_that_is_flat_or_short_has_no_rho():
    assert panel_labels(plots.dose_curves(one_curve([1.0, 1.0, 1.0]))) == [["afraid: no ρ"]]
    assert panel_labels(plots.dose_curves(one_curve([1.0, np.nan, 2.0]))) == [["afraid: no ρ"]]


def test_what_an_evaluation_saved_is_drawn_as_it_is(tmp_path):
    corpus, acts = world(layers=(-1, 2))
    quick(corpus, acts, ["pooled", "paired"], repeats=0).save(tmp_path)
    found = Evaluation.load(tmp_path)
    nulls = found.nulls.query("kind == 'random directions' and layer == 2 and split == 'heldout'")
    null = tuple(nulls[["single_low", "single_high"]].iloc[0])
    here = "method == 'pooled' and layer == 2"
    rows = found.concepts.query(f"{here} and split == 'heldout'")
    assert title(plots.auroc_forest(rows, null=null)).startswith("All 6 concepts do significantly")
    assert "at layer 2 is best" in title(
        plots.method_by_layer(found.summary.query("split == 'heldout'"))
    )
    assert len(labels(plots.hard_negatives(found.hard.query(here)).axes[0].xaxis)) == 2


EMPTY = pd.DataFrame()
TWO = concept_rows(3)
CURVE = one_curve([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plots.auroc_forest(EMPTY), ["method, layer, split, concept, auroc", "empty"]),
        (
            lambda: plots.auroc_forest(
                pd.concat([TWO, TWO.assign(layer=3, auroc=1.2)]), null=(0.6, 0.4)
            ),
            ["one layer", "12, 3", "frame['layer'] == 12", "1.2", "(0.6, 0.4)"],
        ),
        (lambda: plots.auroc_forest(pd.concat([TWO, TWO])), ["one row", "'anticipatory_grief'"]),
        (lambda: plots.auroc_forest(TWO.assign(auroc=np.nan)), ["3 values are missing"]),
        (lambda: plots.auroc_forest(TWO.assign(auroc="high")), ["'high'", "0 to 1"]),
        (lambda: plots.cluster_confusion(EMPTY), ["empty"]),
        (lambda: plots.cluster_confusion(confusion(3).drop(columns="anger")), ["anger", "same"]),
        (lambda: plots.cluster_confusion(confusion(3) * 0), ["all counts are 0"]),
        (lambda: plots.cluster_confusion(confusion(3) - 2), ["counts", "-"]),
        (lambda: plots.cluster_confusion(confusion(3) * np.nan), ["counts", "nan"]),
        (lambda: plots.cluster_confusion(confusion(3).astype(str)), ["no number"]),
        (lambda: plots.cluster_confusion(pd.concat([confusion(3)] * 2)), ["'fear' has 2"]),
        (lambda: plots.cluster_confusion(confusion(3).iloc[:, [0, 0, 1, 2]]), ["'fear'", "twice"]),
        (lambda: plots.method_by_layer(EMPTY), ["median_auroc", "empty"]),
        (lambda: plots.method_by_layer(summaries(2, [1]), value="top1"), ["top1"]),
        (
            lambda: plots.method_by_layer(
                pd.concat([summaries(2, [1]), summaries(2, [1]).assign(split="text")] * 2)
            ),
            ["one split", "heldout, text", "method_0 at 1 is twice"],
        ),
        (lambda: plots.method_by_layer(summaries(2, [1]), value="split"), ["'heldout'"]),
        (
            lambda: plots.method_by_layer(summaries(2, [1]).assign(median_auroc=np.nan)),
            ["missing"],
        ),
        (lambda: plots.hard_negatives(EMPTY), ["ordinary_auroc_low", "empty"]),
        (
            lambda: plots.hard_negatives(
                pd.concat([hard_rows(), hard_rows().assign(method="lda", auroc=-1)])
            ),
            ["one method", "pooled, lda", "-1"],
        ),
        (lambda: plots.hard_negatives(pd.concat([hard_rows()] * 2)), ["'negated' has 2"]),
        (lambda: plots.dose_curves(EMPTY), ["scenario, concept, dose, score", "empty"]),
        (
            lambda: plots.dose_curves(CURVE.assign(dose="3 mg", score=np.inf)),
            ["'3 mg'", "finite score", "inf"],
        ),
        (lambda: plots.dose_curves(CURVE.assign(dose=np.nan)), ["finite dose", "late"]),
        (lambda: plots.dose_curves(CURVE.assign(score=np.nan)), ["missing"]),
        (lambda: plots.dose_curves(CURVE.assign(expected=2)), ["not 2"]),
        (lambda: plots.dose_curves(CURVE.assign(expected="up")), ["not 'up'"]),
        (lambda: plots.dose_curves(CURVE.assign(expected=[1, 1, -1])), ["afraid in late"]),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(draw, words):
    with pytest.raises(AmygdalaError) as error:
        draw()
    assert all(word in str(error.value) for word in words), str(error.value)
