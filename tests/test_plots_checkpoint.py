"""Figures of checkpoints show the counts of a difference, say what they mean, and can be read."""

from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

import amygdala_lib as amy
from amygdala_lib import AmygdalaError
from amygdala_lib.plots.checkpoint import change_by_component, change_map, delta_sizes
from amygdala_lib.plots.style import ORANGE

PARTS = [*(f"self_attn.{p}_proj" for p in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


pytestmark = pytest.mark.usefixtures("quiet_figures")


def frame_of(rows):
    """Rows of name, elements, changed elements, largest change."""
    columns = ["tensor", "elements", "changed_elements", "largest_change"]
    frame = pd.DataFrame(rows, columns=columns).set_index("tensor")
    return frame.assign(blocks=10, changed_blocks=np.minimum(10, frame["changed_elements"]))


def model_of(n_layers):
    rng, rows = np.random.default_rng(0), []
    for layer in range(n_layers):
        for part in PARTS:
            name = f"model.layers.{layer}.{part}.weight"
            rows.append((name, 1000, int(rng.integers(1, 300)), 10 ** rng.normal(-3, 0.3)))
    rows.append(("model.embed_tokens.weight", 4000, 40, 0.5))
    return frame_of(rows)


def texts(figure):
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(plt.Text) if text.get_text()]


def title(figure):
    return figure.axes[0].get_title("left").replace("\n", " ")


def apart(labels, figure, axis):
    boxes = [label.get_window_extent(figure.canvas.get_renderer()) for label in labels]
    spans = sorted((getattr(b, f"{axis}0"), getattr(b, f"{axis}1")) for b in boxes)
    return all(a[1] <= b[0] + 1 for a, b in pairwise(spans))


# The map


def test_a_real_difference_is_drawn_as_shares_of_elements_or_of_blocks(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    names = [f"model.layers.{n}.{part}.weight" for n in range(2) for part in PARTS]
    state = {name: torch.zeros(64, 64, dtype=torch.bfloat16) for name in names}
    save_file(state, folder / "model.safetensors")
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed["model.layers.1.mlp.up_proj.weight"][0, :41] = 0.5
    frame = amy.checkpoint.diff(folder, changed, progress=False).to_frame()
    for of, share in (("elements", 41 / 4096), ("blocks", 0.5)):
        figure = change_map(frame, of)
        figure.draw_without_rendering()
        ax = figure.axes[0]
        shown = ax.images[0].get_array()
        column = [label.get_text() for label in ax.get_xticklabels()].index("up_proj")
        assert shown.shape == (2, 7) and shown[1, column] == pytest.approx(share)
        assert shown.sum() == pytest.approx(share)
        assert "most in up_proj of layer 1" in title(figure)
    only = change_by_component(frame)
    assert [label.get_text() for label in only.axes[0].get_yticklabels()] == ["up_proj"]
    assert only.axes[0].patches[0].get_width() == 0.5


def test_the_largest_share_is_framed_and_what_is_in_no_layer_stands_below():
    frame = model_of(8)
    frame.loc["model.layers.5.self_attn.v_proj.weight", "changed_elements"] = 900
    figure = change_map(frame)
    ax = figure.axes[0]
    frames = [p for p in ax.patches if isinstance(p, Rectangle) and not p.get_fill()]
    assert [patch.get_xy() for patch in frames] == [(1.5, 4.5)]
    assert frames[0].get_edgecolor()[:3] == ORANGE
    total = frame["changed_elements"].sum() / frame["elements"].sum()
    expected = f"{total:.0%} of the elements changed, most in v_proj of layer 5 (90%)"
    assert title(figure) == expected
    assert ax.get_xlabel() == "in no layer: embed_tokens 1.0%"


def test_nothing_changed_looks_unlike_little_changed():
    frame = model_of(4)
    frame["changed_elements"] = 1
    untouched = "model.layers.2.self_attn.k_proj.weight"
    frame.loc[untouched, "changed_elements"] = 0
    image = change_map(frame).axes[0].images[0]
    rgba = image.to_rgba(image.get_array())
    assert tuple(rgba[2, 1, :3]) == (1, 1, 1)
    assert (rgba[..., :3].sum(-1) == 3).sum() == 1
    frame["changed_elements"] = 0
    assert title(change_map(frame)) == "0% of the elements changed"


def test_where_many_share_the_largest_none_is_singled_out():
    frame = model_of(4)
    frame["changed_elements"] = frame["elements"]
    figure = change_map(frame)
    assert title(figure) == "100% of the elements changed, 100% of them in 28 of 28 cells"
    assert not [patch for patch in figure.axes[0].patches if not patch.get_fill()]


def test_experts_count_as_one_part_and_layers_without_a_part_are_hatched():
    rows = [(f"model.layers.0.mlp.experts.{n}.up_proj.weight", 100, n, 0.1) for n in range(4)]
    rows.append(("model.layers.1.linear_attn.A_log", 2, 1, 0.1))
    figure = change_map(frame_of(rows))
    values = np.ma.masked_invalid(figure.axes[0].images[0].get_array())
    assert values.shape == (2, 2)
    assert values.mask.tolist() == [[True, False], [False, True]]
    assert values[0, 1] == pytest.approx(6 / 400) and values[1, 0] == 0.5


def test_99_7_percent_is_not_called_all_and_a_trace_is_not_called_none():
    frame = frame_of([("a.0.mlp.up_proj", 1000, 997, 0.1), ("a.0.mlp.down_proj", 1000, 1000, 0.1)])
    assert "99.9% of the elements" in title(change_map(frame))
    frame = frame_of([("a.0.mlp.up_proj", 10**6, 1, 0.1), ("a.0.mlp.down_proj", 10**6, 0, 0.0)])
    assert "0.000050% of the elements" in title(change_map(frame))


@pytest.mark.parametrize("n_layers", [8, 64])
@pytest.mark.parametrize("of", ["elements", "blocks"])
def test_labels_of_the_map_do_not_overlap(n_layers, of):
    figure = change_map(model_of(n_layers), of)
    figure.draw_without_rendering()
    ax = figure.axes[0]
    assert apart(ax.get_yticklabels(), figure, "y") and apart(ax.get_xticklabels(), figure, "x")
    assert len(ax.get_yticklabels()) <= 32


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (model_of(2).drop(columns="changed_elements"), "needs the columns changed_elements"),
        (model_of(2).iloc[:0], "empty frame"),
        (pd.concat([model_of(1)] * 2), "one row per tensor"),
        (frame_of([("model.norm.weight", 10, 1, 0.1)]), "in none: model.norm.weight"),
    ],
)
def test_a_frame_that_is_no_map_is_refused(frame, said):
    with pytest.raises(AmygdalaError, match=said):
        change_map(frame)


# By component


def test_bars_are_the_largest_change_of_a_part_with_the_share_that_moved():
    frame = model_of(3)
    frame.loc["model.layers.1.self_attn.q_proj.weight", "largest_change"] = 0.25
    figure = change_by_component(frame)
    ax = figure.axes[0]
    widths = [patch.get_width() for patch in ax.patches]
    assert widths == sorted(widths, reverse=True) and len(widths) == len(PARTS) + 1
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[:2] == ["embed_tokens", "q_proj"]
    assert widths[:2] == [0.5, 0.25]
    own = frame[frame.index.str.contains("q_proj")]
    share = own["changed_elements"].sum() / own["elements"].sum()
    assert f"{share:.0%}" in texts(figure)
    assert "0.5 at most" in title(figure)


def test_parts_of_one_short_name_are_told_apart():
    rows = [("model.norm.weight", 10, 1, 0.1), ("model.layers.0.linear_attn.norm", 10, 1, 0.2)]
    labels = change_by_component(frame_of(rows)).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["linear_attn.norm", "model.norm"]


@pytest.mark.parametrize("largest", [0.0, np.nan])
def test_without_a_change_of_floating_point_elements_there_are_no_bars(largest):
    frame = model_of(2).assign(largest_change=largest)
    with pytest.raises(AmygdalaError, match="no element changed"):
        change_by_component(frame)


def test_values_that_are_not_finite_are_named():
    frame = model_of(2)
    frame.loc["model.layers.1.mlp.up_proj.weight", "largest_change"] = np.inf
    with pytest.raises(AmygdalaError, match="not finite come or go in mlp.up_proj"):
        change_by_component(frame)


# Sizes


def sizes_of(columns=("nearest", "stochastic")):
    index = pd.Index([100, 1, 10], name="steps")
    return pd.DataFrame({c: [9e5, 1e4, 1e5 * (n + 1)] for n, c in enumerate(columns)}, index=index)


def test_lines_are_the_sizes_in_order_and_a_dotted_one_is_everything():
    frame = sizes_of()
    frame.loc[100, "nearest"] = 3e5
    figure = delta_sizes(frame, whole=1.2e7)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["stochastic"].get_xdata()) == [1, 10, 100]
    assert list(lines["stochastic"].get_ydata()) == [1e4, 2e5, 9e5]
    assert lines["everything"].get_ydata()[0] == 1.2e7
    assert lines["everything"].get_linestyle() == ":"
    said = "At 100 steps, nearest takes 2.5% of everything, stochastic 7.5%"
    assert title(figure) == said
    assert {"1", "10", "100"} <= set(texts(figure))


def test_a_size_of_0_is_left_out_and_no_size_at_all_is_refused():
    frame = sizes_of()
    frame.loc[1, "nearest"] = 0
    lines = {line.get_label(): line for line in delta_sizes(frame, whole=1e7).axes[0].lines}
    assert np.isnan(lines["nearest"].get_ydata()[0])
    with pytest.raises(AmygdalaError, match="missing"):
        delta_sizes(frame * 0, whole=1e7)


@pytest.mark.parametrize(
    ("change", "whole", "said"),
    [
        (lambda frame: frame.rename(index={1: 0}), 1e7, "begins at 0"),
        (lambda frame: frame, 0, "the whole is 0 bytes"),
        (lambda frame: pd.concat([frame, frame]), 1e7, "one row per steps"),
        (lambda frame: frame.iloc[:0], 1e7, "empty frame"),
    ],
)
def test_sizes_that_have_no_place_on_log_scales_are_refused(change, whole, said):
    with pytest.raises(AmygdalaError, match=said):
        delta_sizes(change(sizes_of()), whole=whole)


def test_each_figure_can_be_drawn_into_given_axes():
    for draw, kwargs in (
        (change_map, {"changes": model_of(2)}),
        (change_by_component, {"changes": model_of(2)}),
        (delta_sizes, {"sizes": sizes_of(), "whole": 1e7}),
    ):
        figure, ax = plt.subplots()
        assert draw(ax=ax, title="mine", **kwargs) is figure
        assert ax.get_title("left") == "mine"
