"""Figures hold at 20 concepts and at 200: every label is legible and nothing warns."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from matplotlib.colors import to_rgba
from matplotlib.text import Text

from amygdala_lib import AmygdalaError, plots

pytestmark = pytest.mark.usefixtures("quiet_figures")


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


def test_every_public_figure_is_at_hand_under_one_name():
    for name in plots.__all__:
        assert getattr(plots, name) is not None


# What follows draws made-up frames of a realistic shape.


def named(n):
    longest = ["anticipatory_grief", "torschlusspanik", "self_conscious", "l_appel_du_vide"]
    return (longest + [f"concept_{i}" for i in range(n)])[:n]


def places(n):
    """Concepts on a coarse grid, as judged values are: many have the same place."""
    rng = np.random.default_rng(0)
    grid = rng.integers(-9, 10, (n, 2)) / 10
    return pd.DataFrame(grid, named(n), ["valence", "arousal"])


def spectra(n, components=19):
    """Shares that fall off as a power, and the components to 90% of them."""
    rng = np.random.default_rng(0)
    shares = np.full((n, components), np.nan)
    for row in shares:
        held = rng.integers(components // 2, components + 1)
        row[:held] = np.arange(1, held + 1) ** -rng.uniform(0.4, 2)
        row[:held] /= row[:held].sum()
    frame = pd.DataFrame(shares, named(n), range(1, components + 1))
    return frame, (frame.fillna(0).cumsum(axis=1) < 0.9 - 1e-9).sum(axis=1) + 1


def qualities(n):
    rng = np.random.default_rng(0)
    buckets = ["clean", "fragmented", "redundant", "single-neuron", "needs-texts"]
    measures = ["first_pc_ratio", "alignment", "best_neuron", "combination_r2"]
    frame = pd.DataFrame(rng.beta(4, 6, (n, 4)), named(n), measures)
    frame["head_concentration"] = rng.uniform(size=n)
    frame["n_texts"] = rng.integers(4, 40, n)
    frame["bucket"] = [buckets[i] for i in rng.choice(5, n, p=[0.55, 0.15, 0.12, 0.03, 0.15])]
    return frame


def head_values(layers, heads, absent=True):
    rng = np.random.default_rng(0)
    values = pd.DataFrame(rng.normal(size=(layers, heads)))
    kinds = ["attention" if i % 4 == 3 else "GatedDeltaNet" for i in range(layers)]
    if absent:
        values.iloc[3::4, heads // 2 :] = np.nan
    return values, kinds


def neurons(n):
    rng = np.random.default_rng(0)
    table = {"layer": np.arange(n) % 36, "neuron": np.arange(n) * 37}
    table |= {"cosine": rng.normal(size=n) / 20, "contribution": rng.normal(size=n)}
    return pd.DataFrame(table)


def layers_alike(n, steady_from):
    """Layers -1 to n - 2 that move apart up to one of them and stay the same from there on."""
    layers = np.arange(n) - 1
    moved = np.minimum(layers, steady_from) * 0.3
    return pd.DataFrame(np.exp(-np.abs(moved[:, None] - moved)), layers, layers)


def method_scores(methods, layers, n):
    rng = np.random.default_rng(0)
    rows = [
        (f"method_{i}", layer, 0.6 + 0.3 * layer / max(layers) + 0.002 * i + 0.03 * rng.normal())
        for i in range(methods)
        for layer in layers
        for _ in range(n)
    ]
    return pd.DataFrame(rows, columns=["method", "layer", "score"])


NEW = {
    "affect_plane": lambda n: plots.affect_plane(
        places(n), clusters=[f"k_{i % 15}" for i in range(n)]
    ),
    "eigenvalue_spectra": lambda n: plots.eigenvalue_spectra(*spectra(n)),
    "quality_overview": lambda n: plots.quality_overview(qualities(n)),
    "head_map": lambda n: plots.head_map(
        *(head_values(8, 4) if n == 20 else head_values(64, 48)), unit="residual units"
    ),
    "neuron_bars": lambda n: plots.neuron_bars(neurons(n), "anticipatory_grief"),
    "layer_likeness": lambda n: plots.layer_likeness(layers_alike(n // 3, n // 6)),
    "method_comparison": lambda n: plots.method_comparison(
        method_scores(*((3, range(8)) if n == 20 else (9, range(-1, 63, 3))), n)
    ),
}


def texts_drawn(figure):
    """Every text that is drawn level or upright, tick labels within the limits included."""
    legends = list(figure.legends)
    found = [*figure.texts]
    if figure._suptitle is not None:
        found.append(figure._suptitle)
    for ax in figure.axes:
        if not ax.get_visible():
            continue
        found += [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label]
        found += [ax._left_title, ax._right_title]
        legends += [ax.get_legend()] if ax.get_legend() else []
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False):
                found += [label] if low <= place <= high else []
    found += [text for legend in legends for text in legend.get_texts()]
    return list(
        {
            id(text): text
            for text in found
            if text.get_visible() and text.get_text().strip() and text.get_rotation() in (0, 90)
        }.values()
    )


def words_box(text):
    """Without the line that joins an annotation to its point."""
    return Text.get_window_extent(text)


def overlapping(figure):
    figure.draw_without_rendering()
    texts = texts_drawn(figure)
    # A pixel of slack: boxes have some air around the letters.
    boxes = np.array([words_box(t).padded(-1).extents for t in texts])
    low, high = boxes[:, None, :2], boxes[None, :, 2:]
    meet = (low < high).all(-1) & (low < high).all(-1).T & ~np.eye(len(texts), dtype=bool)
    return [(texts[i].get_text(), texts[j].get_text()) for i, j in np.argwhere(meet) if i < j]


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("name", NEW)
def test_no_text_lies_on_another(name, n):
    assert overlapping(NEW[name](n)) == []


def title(figure):
    """The figure's or, without one, its first axes' title, on one line."""
    whole = figure.get_suptitle() or figure.axes[0].get_title(loc="left")
    return " ".join(whole.split())


def same_colour(artist, other):
    return to_rgba(artist.get_facecolor()) == to_rgba(other.get_facecolor())


def dots(figure):
    return np.vstack([c.get_offsets() for c in figure.axes[0].collections])


def test_concepts_at_one_place_lie_apart_around_it():
    points = places(20)
    points.iloc[:7] = (-0.6, 0.6)
    shown = dots(plots.affect_plane(points))
    distances = np.linalg.norm(shown[:7, None] - shown[None, :7], axis=2)[~np.eye(7, dtype=bool)]
    assert distances.min() > 0.01
    assert np.allclose(shown[:7].mean(0), (-0.6, 0.6))
    assert np.abs(shown[:7] - (-0.6, 0.6)).max() < 0.03 * np.ptp(points.to_numpy())


def test_a_concept_alone_at_its_place_stays_there():
    points = pd.DataFrame({"valence": [0.1, 0.5, 0.5], "arousal": [0.2, 0.0, 0.0]}, list("abc"))
    assert np.allclose(dots(plots.affect_plane(points))[0], (0.1, 0.2))


def test_even_a_crowd_at_one_place_lies_apart_and_near():
    crowd = pd.DataFrame(np.zeros((61, 2)), named(61), ["valence", "arousal"])
    crowd.iloc[0] = (1, 1)
    shown = dots(plots.affect_plane(crowd))[1:]
    assert len(np.unique(shown.round(9), axis=0)) == 60
    assert np.abs(shown).max() < 0.03


def test_the_name_goes_with_the_point_and_every_drawing_is_the_same():
    points = places(60)
    first, second = plots.affect_plane(points), plots.affect_plane(points)
    shown = dict(zip([name.replace("_", " ") for name in points.index], dots(first), strict=True))
    assert np.array_equal(dots(first), dots(second))
    for text in first.axes[0].texts:
        assert np.allclose(text.xy, shown[text.get_text()])


def test_no_name_covers_a_point():
    figure = plots.affect_plane(places(200))
    at = figure.axes[0].transData.transform(dots(figure))
    for text in figure.axes[0].texts:
        box = words_box(text)
        assert not ((at > box.min) & (at < box.max)).all(1).any(), text.get_text()


def test_concepts_without_a_coordinate_are_left_out_and_counted():
    points = places(20)
    points.iloc[4, 1] = np.nan
    figure = plots.affect_plane(points, clusters=["a", "b"] * 10)
    assert len(dots(figure)) == 19
    assert "1 of 20" in figure.axes[0].get_xlabel()


def test_the_plane_says_how_its_axes_correlate():
    line = pd.DataFrame({"valence": [-1.0, 0.0, 1.0], "arousal": [1.0, 0.0, -1.0]}, list("abc"))
    assert "r = -1.00" in title(plots.affect_plane(line))


def test_spectra_colour_the_components_up_to_the_cut():
    shares, cut = spectra(9)
    figure = plots.eigenvalue_spectra(shares, cut)
    for ax, concept in zip(figure.axes, shares.index, strict=False):
        bars = [bar for bar in ax.patches if bar.get_height()]
        coloured = [bar for bar in bars if same_colour(bar, bars[0])]
        assert [bar.get_height() for bar in bars] == pytest.approx(shares.loc[concept].dropna())
        assert len(coloured) == cut[concept]


def test_cumulative_shares_end_with_the_last_component():
    shares = pd.DataFrame([[0.6, 0.4, np.nan], [0.5, 0.3, 0.2]], ["short", "long"], [1, 2, 3])
    figure = plots.eigenvalue_spectra(shares, pd.Series({"short": 2, "long": 3}))
    lines = [max(ax.lines, key=lambda line: len(line.get_xdata())) for ax in figure.axes]
    assert [list(line.get_xdata())[-1] for line in lines][1] == 3
    assert len(figure.axes[0].patches) == 2


def test_a_concept_without_variance_is_said_not_to_be_measured():
    shares, cut = spectra(4)
    shares.iloc[2], cut = np.nan, cut.astype(float)
    cut.iloc[2] = np.nan
    ax = plots.eigenvalue_spectra(shares, cut).axes[2]
    assert [text.get_text() for text in ax.texts] == ["not measured"] and not ax.patches


def test_many_spectra_are_one_image_with_the_steepest_at_the_top():
    shares, cut = spectra(200)
    ax = plots.eigenvalue_spectra(shares, cut).axes[0]
    shown = ax.images[0].get_array()
    assert shown.shape == shares.shape and (np.diff(shown[:, 0]) <= 0).all()
    assert np.ma.getmaskarray(shown).sum() == shares.isna().sum().sum()
    steepest = shares[1].idxmax()
    assert labels(ax)[0] == steepest.replace("_", " ")
    assert ax.lines[0].get_xdata()[0] == cut[steepest] + 0.5
    assert len(labels(ax)) <= plots.MANY


def test_the_spectra_title_names_the_extremes():
    shares, _ = spectra(3)
    cut = pd.Series([2, 5, 9], ["one_thing", "some", "many_things"])
    found = title(plots.eigenvalue_spectra(shares.set_axis(cut.index), cut))
    assert "median concept needs 5" in found
    assert "one thing only 2" in found and "many things 9" in found


@pytest.mark.parametrize("n", [20, 200])
def test_the_overview_has_every_concept_once_under_its_bucket(n):
    frame = qualities(n)
    shown = [t.get_text() for ax in plots.quality_overview(frame).axes for t in ax.texts]
    seen, bucket = [], None
    for text in shown:
        name = text.replace(" ", "_")
        if text.split(" (")[0] in set(frame["bucket"]) and text.endswith(")"):
            bucket = text.split(" (")[0]
        elif name in frame.index:
            seen.append(name)
            assert frame.loc[name, "bucket"] == bucket
    assert sorted(seen) == sorted(frame.index)
    for _, group in frame.loc[seen].groupby("bucket"):
        assert group["first_pc_ratio"].is_monotonic_decreasing


def test_the_overview_orders_by_another_column():
    frame = qualities(20).assign(bucket="clean")
    ax = plots.quality_overview(frame, by="n_texts").axes[0]
    shown = [t.get_text().replace(" ", "_") for t in ax.texts]
    order = frame.loc[[name for name in shown if name in frame.index], "n_texts"]
    assert order.is_monotonic_decreasing


def test_the_overview_counts_the_buckets():
    frame = qualities(20).assign(bucket=["clean"] * 12 + ["redundant"] * 7 + ["fragmented"])
    assert title(plots.quality_overview(frame)) == (
        "12 of 20 directions are clean; of the others, 7 redundant, 1 fragmented"
    )
    assert "All 20" in title(plots.quality_overview(frame.assign(bucket="clean")))
    assert "None of 20" in title(plots.quality_overview(frame.assign(bucket="redundant")))


def overview_marks(frame):
    """Of the only column of rows: dots on the right side, on the wrong side, hatched cells."""
    collections = plots.quality_overview(frame).axes[0].collections
    scatters = [c for c in collections if len(c.get_sizes() if hasattr(c, "get_sizes") else ())]
    hatched = [c for c in collections if c.get_hatch()]
    right, wrong = scatters[0::2], scatters[1::2]
    return (
        sum(len(c.get_offsets()) for c in right),
        sum(len(c.get_offsets()) for c in wrong),
        sum(len(c.get_paths()) for c in hatched),
    )


def test_what_was_not_measured_is_hatched_and_has_no_dot():
    frame = qualities(20)
    frame["head_concentration"] = np.nan
    frame.loc[frame.index[3], "best_neuron"] = np.nan
    right, wrong, hatched = overview_marks(frame)
    assert hatched == 21 and right + wrong == 5 * 20 - 21
    legend = plots.quality_overview(frame).legends[0]
    assert "not measured" in [text.get_text() for text in legend.get_texts()]


def test_values_beyond_a_threshold_are_marked():
    frame = qualities(4).assign(first_pc_ratio=0.7, best_neuron=0.1, combination_r2=0.5)
    assert overview_marks(frame)[1] == 0
    frame.iloc[1, frame.columns.get_loc("best_neuron")] = 0.61
    frame.iloc[2, frame.columns.get_loc("combination_r2")] = 0.91
    assert overview_marks(frame)[1] == 2


def test_with_its_neighbours_known_a_combination_of_all_is_no_fault():
    frame = qualities(4).assign(first_pc_ratio=0.7, best_neuron=0.1, combination_r2=0.99)
    assert overview_marks(frame)[1] == 4
    assert overview_marks(frame.assign(neighbour_r2=0.3, reliability=0.9))[1] == 0


@pytest.mark.parametrize("size", [(8, 4), (64, 48)])
def test_heads_that_are_not_there_have_no_colour(size):
    values, kinds = head_values(*size)
    ax = plots.head_map(values, kinds, unit="residual units").axes[0]
    assert np.array_equal(np.ma.getmaskarray(ax.images[0].get_array()), values.isna())
    assert ax.patch.get_hatch()
    assert "no such head" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_signed_heads_diverge_around_nothing_and_others_rise_from_it():
    values, kinds = head_values(8, 4)
    signed = plots.head_map(values, kinds, unit="u").axes[0].images[0]
    rising = plots.head_map(values.abs(), kinds, unit="u").axes[0].images[0]
    limit = values.abs().max().max()
    assert signed.get_clim() == (-limit, limit) and rising.get_clim() == (0, limit)
    assert signed.get_cmap().name == plots.DIVERGING and rising.get_cmap().name == plots.SEQUENTIAL


def test_the_head_map_names_the_strongest_head_and_its_layer():
    values, kinds = head_values(8, 4, absent=False)
    values.index = [3, 7, 11, 15, 19, 23, 27, 31]
    values.loc[15, 2] = -9.5
    found = title(plots.head_map(values, kinds, unit="residual units"))
    assert found == "Head 2 of layer 15 (attention) is the strongest: -9.50 residual units"


def test_the_strip_beside_a_head_map_tells_the_kinds():
    values, kinds = head_values(8, 4)
    ax = plots.head_map(values, pd.Series(kinds, index=values.index), unit="u").axes[0]
    rows = [sorted(path.vertices[:, 1].mean() for path in c.get_paths()) for c in ax.collections]
    assert rows == [[3, 7], [0, 1, 2, 4, 5, 6]]


def test_bars_show_the_ten_largest_of_either_sign_and_mark_those_in_both():
    table = neurons(200)
    table.loc[[5, 6, 7], "cosine"] = [0.9, -0.8, 0.7]
    table.loc[[5, 6, 7], "contribution"] = [8.0, 9.0, -7.0]
    figure = plots.neuron_bars(table, "afraid")
    cosine, contribution = figure.axes[:2]
    assert [bar.get_width() for bar in cosine.patches][:3] == [0.9, -0.8, 0.7]
    assert [bar.get_width() for bar in contribution.patches][:3] == [9.0, 8.0, -7.0]
    assert len(cosine.patches) == len(contribution.patches) == 10
    top = [table["cosine"].abs().nlargest(10).index, table["contribution"].abs().nlargest(10).index]
    both = top[0].intersection(top[1])
    for ax, rows in zip((cosine, contribution), top, strict=True):
        for bar, row in zip(ax.patches, rows, strict=True):
            assert same_colour(bar, cosine.patches[0]) == (row in both)
    assert title(figure).startswith(f"{len(both)} of the 10 neurons closest to afraid")


def test_a_neuron_without_a_contribution_is_not_shown_as_writing_nothing():
    table = neurons(12)
    table.loc[3:, "contribution"] = np.nan
    ax = plots.neuron_bars(table, "afraid").axes[1]
    assert len(ax.patches) == 3 and "9 not measured" in ax.get_title(loc="right")


@pytest.mark.parametrize("n", [20, 66])
def test_likeness_says_from_which_layer_on_the_geometry_stays(n):
    figure = plots.layer_likeness(layers_alike(n, steady_from=6))
    assert title(figure).startswith("From layer 6 on the geometry of the concepts stays")
    (frame,) = figure.axes[0].patches
    assert frame.get_xy() == (6.5, 6.5) and frame.get_width() == n - 7


def test_likeness_says_where_the_geometry_changes_most():
    rsa = layers_alike(12, steady_from=99)
    side = np.array(rsa.index) > 3
    rsa = rsa * np.where(side[:, None] == side, 1, 0.5)
    found = title(plots.layer_likeness(rsa))
    assert "changes most between layer 3 and layer 4 (correlation 0.37)" in found


def test_likeness_knows_drift_and_standstill():
    drift = pd.DataFrame(np.exp(-0.05 * np.abs(np.subtract.outer(range(20), range(20)))))
    assert "drifts slowly" in title(plots.layer_likeness(drift))
    assert "All layers" in title(plots.layer_likeness(pd.DataFrame(np.ones((5, 5)))))


def test_likeness_names_the_embeddings_and_leaves_gaps_uncoloured():
    rsa = layers_alike(8, steady_from=3)
    rsa.loc[0, 2] = rsa.loc[2, 0] = np.nan
    ax = plots.layer_likeness(rsa).axes[0]
    assert labels(ax)[0] == "embed"
    assert np.ma.getmaskarray(ax.images[0].get_array()).sum() == 2


def test_likeness_orders_the_layers():
    rsa = layers_alike(12, steady_from=4)
    shuffled = rsa.sample(frac=1, random_state=0).sample(frac=1, axis=1, random_state=1)
    assert title(plots.layer_likeness(shuffled)) == title(plots.layer_likeness(rsa))


def test_methods_show_the_median_and_the_quartiles():
    scores = method_scores(3, range(8), 20)
    ax = plots.method_comparison(scores).axes[0]
    own = scores[(scores["method"] == "method_1")].groupby("layer")["score"]
    line = next(line for line in ax.lines if line.get_label() == "method_1")
    assert np.allclose(line.get_ydata(), own.agg(np.median))
    band = ax.collections[1].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(own.quantile(0.25).min())
    assert band[:, 1].max() == pytest.approx(own.quantile(0.75).max())


def test_the_best_method_is_in_the_title():
    scores = method_scores(3, range(8), 20)
    scores.loc[(scores["method"] == "method_2") & (scores["layer"] == 5), "score"] = 0.97
    found = title(plots.method_comparison(scores))
    assert found.startswith("method 2 does best, at layer 5: median 0.97, before method")


def test_methods_that_are_equally_good_are_all_named():
    scores = method_scores(3, [0, 1], 5).assign(score=0.7)
    assert title(plots.method_comparison(scores)).startswith("All methods do equally well")
    scores.loc[scores["method"] == "method_0", "score"] = 0.6
    assert title(plots.method_comparison(scores)).startswith("method 1 and method 2 do best")


def test_a_layer_without_scores_is_a_gap():
    scores = method_scores(2, range(6), 10)
    scores.loc[(scores["method"] == "method_0") & (scores["layer"] == 3), "score"] = np.nan
    ax = plots.method_comparison(scores).axes[0]
    line = next(line for line in ax.lines if line.get_label() == "method_0")
    assert np.isnan(line.get_ydata()).tolist() == [False, False, False, True, False, False]


def test_one_layer_puts_the_methods_side_by_side_best_first():
    scores = method_scores(9, [12], 50)
    ax = plots.method_comparison(scores).axes[0]
    medians = scores.groupby("method")["score"].median().sort_values(ascending=False)
    shown = [label.get_text().replace(" ", "_") for label in ax.get_xticklabels()]
    assert shown == list(medians.index) and "layer 12" in ax.get_xlabel()


EMPTY = pd.DataFrame()
VALUES, KINDS = head_values(8, 4)
RSA = layers_alike(4, 2)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plots.affect_plane(places(5).drop(columns="arousal")), ["arousal"]),
        (lambda: plots.affect_plane(EMPTY), ["valence, arousal", "empty"]),
        (lambda: plots.affect_plane(places(5), clusters=["a"]), ["1 clusters", "5 concepts"]),
        (lambda: plots.affect_plane(places(5) * np.nan), ["missing"]),
        (lambda: plots.eigenvalue_spectra(EMPTY, pd.Series(dtype=float)), ["empty"]),
        (lambda: plots.eigenvalue_spectra(spectra(5)[0], spectra(4)[1]), ["no cut", "concept_0"]),
        (lambda: plots.eigenvalue_spectra(spectra(5)[0] * 7, spectra(5)[1]), ["shares", "0 to 1"]),
        (lambda: plots.quality_overview(EMPTY), ["bucket", "alignment", "empty"]),
        (lambda: plots.quality_overview(qualities(5).drop(columns="n_texts")), ["n_texts"]),
        (lambda: plots.quality_overview(qualities(5).assign(bucket="fine")), ["'fine'", "clean"]),
        (lambda: plots.quality_overview(qualities(5), by="bucket"), ["'bucket'", "n_texts"]),
        (lambda: plots.quality_overview(pd.concat([qualities(5)] * 2)), ["one row", "has 2"]),
        (
            lambda: plots.quality_overview(pd.concat({3: qualities(5)}, names=["layer", "name"])),
            ["layer, name", ".xs("],
        ),
        (lambda: plots.head_map(EMPTY, [], unit="u"), ["empty"]),
        (lambda: plots.head_map(VALUES * np.nan, KINDS, unit="u"), ["32 values are missing"]),
        (lambda: plots.head_map(VALUES, KINDS[:5], unit="u"), ["5 kinds", "8 layers"]),
        (lambda: plots.head_map(VALUES, ["MLP"] * 8, unit="u"), ["MLP", "GatedDeltaNet"]),
        (lambda: plots.neuron_bars(EMPTY, "afraid"), ["cosine", "empty"]),
        (lambda: plots.neuron_bars(neurons(9).drop(columns="cosine"), "afraid"), ["cosine"]),
        (lambda: plots.neuron_bars(pd.concat([neurons(3)] * 2), "afraid"), ["layer 0", "twice"]),
        (lambda: plots.neuron_bars(neurons(9).assign(cosine=np.nan), "afraid"), ["cosine"]),
        (lambda: plots.layer_likeness(EMPTY), ["empty"]),
        (lambda: plots.layer_likeness(RSA.drop(columns=2)), ["rows", "columns"]),
        (lambda: plots.layer_likeness(RSA.mask(np.triu(RSA > 0, 1), 0.1)), ["symmetric"]),
        (lambda: plots.layer_likeness(RSA.mask(np.eye(4, k=2) > 0)), ["symmetric", "nan"]),
        (lambda: plots.layer_likeness(RSA.iloc[:1, :1]), ["only [-1]"]),
        (lambda: plots.method_comparison(EMPTY), ["method, layer, score", "empty"]),
        (lambda: plots.method_comparison(method_scores(10, [1], 2)), ["9", "not 10"]),
        (
            lambda: plots.method_comparison(method_scores(2, [1], 2).assign(score=np.nan)),
            ["missing"],
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(draw, words):
    with pytest.raises(AmygdalaError) as error:
        draw()
    assert all(word in str(error.value) for word in words), str(error.value)
