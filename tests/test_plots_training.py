"""Figures of training runs show their numbers, say what they mean, and can be read."""

from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from amygdala_lib import AmygdalaError
from amygdala_lib.plots.style import ORANGE
from amygdala_lib.plots.training import (
    GROUPS,
    gradient_map,
    group_of,
    interval_panels,
    part_bars,
    sweep_grid,
    training_curves,
)
from amygdala_lib.training import train
from amygdala_lib.training.examples import Example

GDN = ["dt_bias", "A_log", "conv1d", "norm", "out_proj"]
GDN += ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"]
ATTENTION = ["q_norm", "k_norm", "q_proj", "k_proj", "v_proj", "o_proj"]
EVERYWHERE = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
EVERYWHERE += ["input_layernorm", "post_attention_layernorm"]


pytestmark = pytest.mark.usefixtures("quiet_figures")


def frame_of(rows):
    frame = pd.DataFrame(rows, columns=["layer", "part", "norm", "gradient", "change"])
    names = ["" if row[0] is None else f"model.layers.{row[0]}." for row in rows]
    frame.index = pd.Index(names + frame["part"], name="name")
    return frame.astype({"layer": "Int64"})


def hybrid(n_layers):
    """Three GatedDeltaNet layers, one of attention, and so on: as the bundled model is."""
    rng, rows = np.random.default_rng(0), []
    for layer in range(n_layers):
        own = [f"self_attn.{part}" for part in ATTENTION]
        if layer % 4 != 3:
            own = [f"linear_attn.{part}" for part in GDN]
        for part in [*own, *EVERYWHERE]:
            rows.append((layer, part, rng.uniform(1, 30), 10 ** rng.normal(-2, 1), rng.random()))
    rows += [(None, "model.embed_tokens", 50.0, 2.5, 0.5), (None, "model.norm", 8.0, 4.0, 0.1)]
    return frame_of(rows)


def drawn(figure):
    """Layers, parts and the masked values of a map."""
    figure.draw_without_rendering()
    ax = figure.axes[0]
    parts = [label.get_text() for label in ax.get_xticklabels()]
    return ax, parts, ax.images[0].get_array()


def texts(figure):
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(plt.Text) if text.get_text()]


def title(figure):
    found = [figure.get_suptitle(), *(ax.get_title("left") for ax in figure.axes)]
    return next(text for text in found if text).replace("\n", " ")


def do_not_overlap(labels, figure, axis):
    boxes = [label.get_window_extent(figure.canvas.get_renderer()) for label in labels]
    spans = sorted((getattr(b, f"{axis}0"), getattr(b, f"{axis}1")) for b in boxes)
    return all(a[1] <= b[0] + 1 for a, b in pairwise(spans))


# The map


@pytest.mark.parametrize("of", ["gradient", "change"])
def test_a_cell_is_norm_over_norm_and_hatched_where_a_layer_has_no_such_part(of):
    changes = hybrid(8)
    ax, parts, values = drawn(gradient_map(changes, of))
    assert values.shape == (8, 20)
    attention, delta = parts.index("q_proj"), parts.index("A_log")
    row = changes.loc["model.layers.3.self_attn.q_proj"]
    assert values[3, attention] == pytest.approx(row[of] / row["norm"])
    row = changes.loc["model.layers.4.linear_attn.A_log"]
    assert values[4, delta] == pytest.approx(row[of] / row["norm"])
    missing = np.ma.getmaskarray(np.ma.masked_invalid(values))
    assert list(np.flatnonzero(~missing[:, attention])) == [3, 7]
    assert list(np.flatnonzero(~missing[:, delta])) == [0, 1, 2, 4, 5, 6]
    assert missing.sum() == 6 * 6 + 2 * 9
    assert ax.patch.get_hatch()


def test_parts_stand_in_their_groups_projections_in_the_usual_order():
    ax, parts, _ = drawn(gradient_map(hybrid(8)))
    assert parts[:6] == ["q_proj", "k_proj", "v_proj", "o_proj", "k_norm", "q_norm"]
    assert parts[6:8] == ["in_proj_qkv", "in_proj_z"] and parts[15:18][0] == "gate_proj"
    heads = {text.get_text(): text.get_position()[0] for text in ax.texts}
    assert heads == {"attention": 2.5, "GatedDeltaNet": 10, "MLP": 16, "norms": 18.5}


def test_the_largest_is_framed_and_named_with_the_smallest():
    changes = hybrid(8)
    changes.loc["model.layers.5.linear_attn.conv1d", ["norm", "gradient"]] = 1.0, 1000.0
    changes.loc["model.layers.7.self_attn.v_proj", ["norm", "gradient"]] = 1000.0, 1e-6
    figure = gradient_map(changes)
    ax, parts, _ = drawn(figure)
    (frame,) = [p for p in ax.patches if isinstance(p, Rectangle) and not p.get_fill()]
    assert frame.get_xy() == (parts.index("conv1d") - 0.5, 4.5)
    assert frame.get_edgecolor()[:3] == pytest.approx(ORANGE)
    assert title(figure) == (
        "For its weights the gradient is largest in conv1d of layer 5 (1000.00), smallest in "
        "v_proj of layer 7 (1.0e-09)"
    )
    assert title(gradient_map(changes, title="Mine")) == "Mine"


def test_what_is_in_no_layer_stands_below_the_map():
    figure = gradient_map(hybrid(8))
    assert figure.axes[0].get_xlabel() == "in no layer: embed_tokens 0.05, norm 0.50"
    inside = hybrid(8).dropna(subset="layer")
    assert gradient_map(inside).axes[0].get_xlabel() == ""


def test_the_experts_of_a_layer_are_one_part():
    rows = [(0, f"mlp.experts.{i}.up_proj", 2.0, float(i), 0.0) for i in range(3)]
    _, parts, values = drawn(gradient_map(frame_of([*rows, (0, "self_attn.q_proj", 1.0, 1, 1)])))
    assert parts == ["q_proj", "experts.up_proj"]
    assert values[0, 1] == pytest.approx(np.sqrt(0 + 1 + 4) / np.sqrt(3 * 4))


def test_a_gradient_of_zero_is_white_and_weights_of_zero_have_no_cell():
    changes = hybrid(8)
    changes.loc["model.layers.3.self_attn.k_proj", "gradient"] = 0.0
    changes.loc["model.layers.3.self_attn.v_proj", "norm"] = 0.0
    ax, parts, values = drawn(gradient_map(changes))
    colours = ax.images[0].to_rgba(values)
    assert tuple(colours[3, parts.index("k_proj")]) == (1, 1, 1, 1)
    assert colours[7, parts.index("k_proj"), :3].sum() < 3
    assert np.ma.masked_invalid(values).mask[3, parts.index("v_proj")]


@pytest.mark.parametrize("n_layers", [1, 8, 64])
def test_the_map_can_be_read_at_any_depth(n_layers):
    figure = gradient_map(hybrid(n_layers))
    ax, parts, values = drawn(figure)
    assert values.shape[0] == n_layers and len(set(parts)) == len(parts)
    named = [label.get_text() for label in ax.get_yticklabels()]
    assert named[0] == "0" and len(named) == min(n_layers, 32)
    assert do_not_overlap(ax.get_yticklabels(), figure, "y")
    assert do_not_overlap(ax.get_xticklabels(), figure, "x")
    assert do_not_overlap(ax.texts, figure, "x")
    width, height = figure.get_size_inches()
    assert width < 12 and height < 13


def test_the_map_draws_into_given_axes():
    _, ax = plt.subplots(layout="constrained")
    assert gradient_map(hybrid(4), ax=ax) is ax.figure and ax.images


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: f.drop(columns=["gradient", "part"]), "columns part, gradient"),
        (lambda f: f.iloc[:0], "empty frame"),
        (lambda f: pd.concat([f, f.iloc[:1]]), "has 2"),
        (lambda f: f.assign(gradient=np.nan), "nothing to draw"),
        (lambda f: f.assign(gradient=0.0), "all values are 0"),
        (lambda f: f.assign(norm=0.0), "all weights are 0"),
        (lambda f: f[f["layer"].isna()], "in none: model.embed_tokens, model.norm"),
    ],
)
def test_a_map_of_nothing_is_refused(damage, said):
    with pytest.raises(AmygdalaError, match=said):
        gradient_map(damage(hybrid(4)))
    assert not plt.get_fignums(), "no empty figure is left"


@pytest.mark.parametrize(
    ("part", "group"),
    [
        ("self_attn.q_norm", "attention"),
        ("attn.c_attn.bias", "attention"),
        ("linear_attn.norm", "GatedDeltaNet"),
        ("post_attention_layernorm", "norms"),
        ("ln_1.bias", "norms"),
        ("mlp.experts.gate_up_proj", "MLP"),
        ("block_sparse_moe.gate", "MLP"),
        ("model.embed_tokens", "other"),
    ],
)
def test_parts_are_grouped_by_what_they_are_called(part, group):
    assert group_of(part) == group


def test_the_account_of_a_real_run_is_drawn(loaded):
    examples = [Example((5, 6, 7), (8, 9)), Example((9, 8), (7, 6, 5))]
    result = train(loaded("qwen3_5"), examples, batch_size=2, dry_run=True, progress=False)
    row = result.changes[result.changes["part"] == "self_attn.q_proj"].iloc[0]
    for of in ("gradient", "change"):
        _, parts, values = drawn(gradient_map(result.changes, of))
        drawn_there = values[row["layer"], parts.index("q_proj")]
        assert drawn_there == pytest.approx(row[f"relative_{of}"])
        assert {"A_log", "dt_bias", "conv1d", "in_proj_qkv", "down_proj"} < set(parts)


# Bars


def lost():
    frame = pd.DataFrame({"half": [0.1, 0.4, 0.0], "all": [0.2, 0.8, 0.1]})
    return frame.set_index(pd.Index(["mlp.up_proj", "linear_attn.A_log", "self_attn.q_proj"]))


def test_bars_are_the_last_column_longest_first_in_the_colour_of_their_group():
    figure = part_bars(lost(), unit="share lost")
    ax = figure.axes[0]
    assert [bar.get_width() for bar in ax.patches] == [0.8, 0.2, 0.1]
    heights = [bar.get_y() for bar in ax.patches]
    assert heights == sorted(heights, reverse=True)
    colours = [bar.get_facecolor()[:3] for bar in ax.patches]
    expected = [GROUPS["GatedDeltaNet"], GROUPS["MLP"], GROUPS["attention"]]
    assert np.allclose(colours, expected)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["A_log", "up_proj", "q_proj"]
    (marks,) = ax.lines
    assert list(marks.get_xdata()) == [0.4, 0.1, 0.0]
    assert {"half", "attention", "GatedDeltaNet", "MLP"} <= set(texts(figure))
    assert title(figure) == "Share lost: A_log 0.80, q_proj 0.10"


def test_bars_go_to_the_left_of_0_where_a_part_is_below_it():
    frame = lost()
    frame.loc["mlp.up_proj", "all"] = -0.3
    ax = part_bars(frame, unit="cosine").axes[0]
    assert [bar.get_width() for bar in ax.patches] == [0.8, 0.1, -0.3]
    assert ax.get_xlim()[0] < -0.3
    assert part_bars(lost(), unit="share lost").axes[0].get_xlim()[0] == 0


def test_bars_without_a_number_are_left_out():
    frame = lost()
    frame.loc["mlp.up_proj", "all"] = np.nan
    assert len(part_bars(frame, unit="share lost").axes[0].patches) == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: f.iloc[:0], "empty frame"),
        (lambda f: f[[]], "empty frame"),
        (lambda f: pd.concat([f, f]), "has 2"),
        (lambda f: f.assign(all=np.nan), "nothing to draw"),
    ],
)
def test_bars_of_nothing_are_refused(damage, said):
    with pytest.raises(AmygdalaError, match=said):
        part_bars(damage(lost()), unit="share lost")


# Curves


def measured(runs=("without replay", "with replay"), steps=(0, 5, 10), columns=3):
    index = pd.MultiIndex.from_product([runs, steps], names=["run", "step"])
    values = np.arange(len(index) * columns, dtype=float).reshape(len(index), columns)
    return pd.DataFrame(values, index, [f"measure_{i}" for i in range(columns)])


def test_every_run_is_a_line_in_every_panel():
    figure = training_curves(measured(), unit="nats per token")
    assert [ax.get_title("left") for ax in figure.axes] == ["measure 0", "measure 1", "measure 2"]
    for number, ax in enumerate(figure.axes):
        lines = [line for line in ax.lines if len(line.get_xdata()) == 3]
        assert [list(line.get_ydata()) for line in lines] == [
            [number, number + 3, number + 6],
            [number + 9, number + 12, number + 15],
        ]
        assert list(lines[0].get_xdata()) == [0, 5, 10]
        (start,) = [line for line in ax.lines if line not in lines]
        assert start.get_ydata()[0] == number
    assert {"without replay", "with replay", "nats per token"} <= set(texts(figure))


def test_the_title_tells_how_far_each_measure_went():
    frame = measured(columns=2)
    frame.loc[("with replay", 10), "measure_1"] = 7.5
    assert title(training_curves(frame)) == (
        "After 10 steps: measure 0 +4.00, measure 1 +0.50 to +4.00"
    )
    assert title(training_curves(frame, title="Mine")) == "Mine"


@pytest.mark.parametrize("columns", [1, 3, 4, 7])
@pytest.mark.parametrize("runs", [1, 2, 24])
def test_panels_are_as_many_as_measures(columns, runs):
    figure = training_curves(measured([f"run {i}" for i in range(runs)], columns=columns))
    figure.draw_without_rendering()
    assert sum(ax.axison for ax in figure.axes) == columns
    assert figure.get_size_inches()[0] < 12


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: f.reset_index("run"), "needs the index run, step: the frame has step"),
        (lambda f: f.iloc[:0], "empty frame"),
        (lambda f: pd.concat([f, f]), "one point per run and step"),
        (lambda f: f.assign(measure_1=np.nan), "nothing to draw of measure_1"),
        (lambda f: f[[]], "empty frame"),
    ],
)
def test_curves_of_nothing_are_refused(damage, said):
    with pytest.raises(AmygdalaError, match=said):
        training_curves(damage(measured()))


# Sweeps

LABELS = {"lr": "learning rate", "share": "share of cues", "harm": "perplexity ratio"}


def swept(panels=("SFT", "DPO"), runs=("chosen", "rejected"), xs=(1e-4, 3e-4, 1e-3)):
    index = ["measure", "panel", "run", "lr"]
    keys = pd.MultiIndex.from_product([["share", "harm"], panels, runs, xs], names=index)
    frame = pd.DataFrame({"value": np.arange(len(keys), dtype=float)}, keys).reset_index()
    return frame.assign(low=frame["value"] - 1, high=frame["value"] + 1)


def test_every_run_is_a_line_with_its_band_in_the_panel_of_its_measure():
    frame = swept().sample(frac=1, random_state=0)  # in whatever order
    frame = frame.sort_values(["measure", "panel", "run"], ascending=False, kind="stable")
    figure = sweep_grid(frame, "lr", labels=LABELS, title="Mine", log_x=True)
    assert title(figure) == "Mine" and len(figure.axes) == 4
    assert [ax.get_title("left") for ax in figure.axes] == ["SFT", "DPO", "", ""]
    wanted = swept().set_index(["measure", "panel", "run", "lr"])["value"].sort_index()
    places = [(m, p) for m in ("share", "harm") for p in ("SFT", "DPO")]
    for ax, (measure, panel) in zip(figure.axes, places, strict=True):
        assert ax.get_xscale() == "log" and len(ax.collections) == 2
        for line, run in zip(ax.lines, ("rejected", "chosen"), strict=True):
            assert list(line.get_ydata()) == wanted[measure, panel, run].to_list()
            assert list(line.get_xdata()) == [1e-4, 3e-4, 1e-3]
    assert {"learning rate", "share of cues", "perplexity ratio", "95% interval"} <= set(
        texts(figure)
    )


def test_a_measure_has_one_scale_and_a_line_where_it_was_before():
    figure = sweep_grid(swept(), "lr", labels=LABELS, title="A finding", baseline={"harm": 1.0})
    first, second, third, fourth = figure.axes
    assert first.get_ylim() == second.get_ylim() != third.get_ylim() == fourth.get_ylim()
    assert [len(ax.lines) for ax in figure.axes] == [2, 2, 3, 3]
    dotted = third.lines[0]
    assert dotted.get_linestyle() == ":" and dotted.get_ydata()[0] == 1.0
    assert "before" in texts(figure)


def test_values_without_an_interval_and_runs_without_a_panel_are_drawn_all_the_same():
    frame = swept().assign(low=np.nan, high=np.nan)
    frame = frame[(frame["panel"] == "SFT") | (frame["run"] == "chosen")]
    figure = sweep_grid(frame, "lr", labels=LABELS, title="A finding")
    lines = [[len(line.get_xdata()) for line in ax.lines] for ax in figure.axes]
    assert lines == [[3, 3], [3], [3, 3], [3]]
    assert "95% interval" not in texts(figure)


def test_points_are_joined_by_dose_where_x_is_an_effect():
    frame = swept(["SFT"], ["chosen"]).rename(columns={"lr": "dose"})
    frame["effect"] = [0.2, 0.9, 0.9, 0.2, 0.9, 0.5]
    labels = LABELS | {"effect": "effect"}
    figure = sweep_grid(frame, "effect", labels=labels, title="A finding", along="dose")
    shown = [list(ax.lines[0].get_xdata()) for ax in figure.axes]
    assert shown == [[0.2, 0.9, 0.9], [0.2, 0.9, 0.5]]


@pytest.mark.parametrize("panels", [1, 4])
def test_a_grid_can_be_read(panels):
    frame = swept([f"objective {i}" for i in range(panels)], xs=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3))
    figure = sweep_grid(frame, "lr", labels=LABELS, title="A finding", log_x=True)
    figure.draw_without_rendering()
    bottom = figure.axes[-1]
    shown = [t for t in bottom.get_xticklabels() if t.get_text()]
    assert do_not_overlap(shown, figure, "x")
    assert figure.get_size_inches()[0] < 12


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: f.drop(columns=["run", "low"]), "columns run, low"),
        (lambda f: f.iloc[:0], "empty frame"),
        (lambda f: pd.concat([f, f]), "at one lr: SFT, chosen, share, 0.0001 is twice"),
        (lambda f: f.assign(value=np.nan), "nothing to draw"),
        (lambda f: f.replace({"measure": {"harm": "cost"}}), "labels of cost"),
        (lambda f: f.assign(lr=f["lr"] - 1e-4), "lr 0 on a logarithmic axis"),
    ],
)
def test_a_grid_of_nothing_is_refused(damage, said):
    with pytest.raises(AmygdalaError, match=said):
        sweep_grid(damage(swept()), "lr", labels=LABELS, title="A finding", log_x=True)
    assert not plt.get_fignums(), "no empty figure is left"


# Ways compared


def ways(names=("as it is", "taken out", "random"), measures=("share", "harm")):
    keys = pd.MultiIndex.from_product([measures, names], names=["measure", "way"])
    frame = pd.DataFrame({"value": np.arange(len(keys), dtype=float)}, keys).reset_index()
    return frame.assign(low=frame["value"] - 1, high=frame["value"] + 2)


def test_every_way_is_a_dot_with_its_interval_and_the_first_at_the_top():
    figure = interval_panels(ways(), labels=LABELS, title="Mine")
    assert title(figure) == "Mine"
    for number, ax in enumerate(figure.axes):
        base, *marks = ax.lines
        assert base.get_xdata()[0] == 3 * number and base.get_linestyle() == ":"
        for place, (bar, dot) in enumerate(zip(marks[::2], marks[1::2], strict=True)):
            value = 3 * number + place
            assert list(bar.get_xdata()) == [value - 1, value + 2]
            assert list(dot.get_xdata()) == [value] and list(dot.get_ydata()) == [2 - place]
    figure.draw_without_rendering()
    named = figure.axes[0].get_yticklabels()
    assert [t.get_text() for t in named] == ["as it is", "taken out", "random"]
    assert do_not_overlap(named, figure, "y")
    assert {"share of cues", "perplexity ratio"} <= set(texts(figure))


def test_a_way_that_a_measure_does_not_have_is_left_out_there():
    frame = ways()
    frame = frame[(frame["measure"] == "share") | (frame["way"] != "as it is")]
    figure = interval_panels(frame, labels=LABELS, title="A finding")
    assert [len(ax.lines) for ax in figure.axes] == [7, 4]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: f.drop(columns=["way"]), "columns way"),
        (lambda f: f.iloc[:0], "empty frame"),
        (lambda f: pd.concat([f, f]), "as it is, share is there twice"),
        (lambda f: f.assign(value=np.nan), "nothing to draw"),
        (lambda f: f.replace({"measure": {"harm": "cost"}}), "labels of cost"),
    ],
)
def test_ways_of_nothing_are_refused(damage, said):
    with pytest.raises(AmygdalaError, match=said):
        interval_panels(damage(ways()), labels=LABELS, title="A finding")
    assert not plt.get_fignums(), "no empty figure is left"
