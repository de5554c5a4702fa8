"""Figures hold at 20 concepts and at 200: every label is legible and nothing warns."""

import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from amygdala_lib import plots


@pytest.fixture(autouse=True)
def closing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


def concepts(n, n_clusters=8):
    rng = np.random.default_rng(0)
    clusters = [f"cluster_{i % n_clusters}" for i in range(n)]
    centres = rng.normal(size=(n_clusters, 32))
    vectors = np.array([centres[i % n_clusters] for i in range(n)]) + rng.normal(size=(n, 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T, [f"concept_{i}" for i in range(n)], clusters


def labels(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_a_small_heatmap_names_every_concept():
    cosines, names, clusters = concepts(20)
    figure = plots.similarity_heatmap(cosines, names, clusters)
    assert sorted(labels(figure.axes[0])) == sorted(name.replace("_", " ") for name in names)


def test_a_large_heatmap_names_the_clusters():
    cosines, names, clusters = concepts(200)
    figure = plots.similarity_heatmap(cosines, names, clusters)
    assert sorted(labels(figure.axes[0])) == [f"cluster {i}" for i in range(8)]


def test_a_heatmap_shows_the_cosine_of_the_named_pair():
    cosines, names, clusters = concepts(20)
    ax = plots.similarity_heatmap(cosines, names, clusters).axes[0]
    shown, order = ax.images[0].get_array(), labels(ax)
    row, column = order.index("concept 3"), order.index("concept 11")
    assert shown[row, column] == pytest.approx(cosines[3, 11])
    assert np.ma.getmaskarray(shown)[row, row] or np.isnan(shown[row, row])


def test_the_colour_scale_is_centred_and_ignores_the_diagonal():
    cosines, names, _ = concepts(20)
    low, high = plots.similarity_heatmap(cosines, names).axes[0].images[0].get_clim()
    assert low == -high == -np.abs(cosines[~np.eye(20, dtype=bool)]).max()


@pytest.mark.parametrize("n", [2, 3, 20])
def test_few_concepts_are_no_special_case(n):
    cosines, names, clusters = concepts(n, n_clusters=2)
    plots.similarity_heatmap(cosines, names, clusters)
    plots.similarity_heatmap(cosines, names)


@pytest.mark.parametrize("n", [20, 200])
def test_clustermap_orders_all_concepts(n):
    cosines, names, clusters = concepts(n)
    figure = plots.similarity_clustermap(cosines, names, clusters)
    named = [sorted(labels(ax)) for ax in figure.axes]
    readable = sorted(name.replace("_", " ") for name in names)
    assert (readable in named) == (n <= plots.MANY)
    assert "cluster 0" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("n", [20, 200])
def test_affect_plane_names_a_spread_subset(n):
    rng = np.random.default_rng(0)
    points = pd.DataFrame(
        rng.uniform(-1, 1, (n, 2)), [f"c_{i}" for i in range(n)], ["valence", "arousal"]
    )
    named = plots.affect_plane(points, clusters=["a"] * n).axes[0].texts
    assert len(named) == n if n == 20 else 20 < len(named) <= plots.MANY


def test_token_heatmap_reads_every_token_in_order():
    rng = np.random.default_rng(0)
    tokens = [f" t{i}" for i in range(80)]
    values = pd.DataFrame(rng.normal(size=(80, 200)), tokens, [f"c_{i}" for i in range(200)])
    figure = plots.token_heatmap(values, title="A title", most=10)
    panels = [ax for ax in figure.axes if ax.images]
    shown = [label.get_text() for ax in panels for label in ax.get_xticklabels()]
    assert shown == [token.strip() for token in tokens]
    assert all(len(ax.get_yticks()) == 10 for ax in panels)


def test_concept_counts_by_concept_or_by_cluster():
    counts = pd.DataFrame({"story": 3, "direct": 6, "paired": 2}, [f"c_{i}" for i in range(100)])
    counts["cluster"] = [f"k_{i % 9}" for i in range(100)]
    assert len(plots.concept_counts(counts.iloc[:24]).axes[0].get_yticks()) == 24
    assert len(plots.concept_counts(counts).axes[0].get_yticks()) == 9


def test_separation_titles_say_the_finding():
    aurocs = pd.DataFrame({-1: [0.6, 0.7], 3: [0.9, 0.95]}, ["afraid", "calm"])
    assert "layer 3" in plots.separation_by_layer(aurocs, 8).axes[0].get_title(loc="left")
