"""Figures of a steering sweep show its numbers, say what they mean, and can be read."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from amygdala_lib import AmygdalaError
from amygdala_lib.plots.steering import side_effects, steering_depth, steering_dose
from amygdala_lib.plots.style import ORANGE

STRENGTHS = (0.2, 0.35, 0.5, 0.65, 0.8)


pytestmark = pytest.mark.usefixtures("quiet_figures")


def named(n):
    longest = ["anticipatory_grief", "torschlusspanik", "calm + curious", "l_appel_du_vide"]
    return (longest + [f"concept_{i}" for i in range(n)])[:n]


def cells(n, layers=(1, 2, 3), strengths=STRENGTHS):
    """Concepts that steer at layer 2 the better the earlier they come; text suffers above 0.6."""
    rows = []
    for i, concept in enumerate(named(n)):
        ease = 1 - 0.8 * i / max(1, n - 1)
        for layer in layers:
            for strength in strengths:
                target = float(np.clip(0.05 + ease * 1.4 * strength / (1 + abs(layer - 2)), 0, 1))
                for split in ("choice", "held_out"):
                    rows.append(
                        {
                            "concept": concept, "layer": layer, "strength": strength,
                            "split": split, "target": target if split == "held_out" else 0.0,
                            "target_low": max(0, target - 0.2), "target_high": min(1, target + 0.2),
                            "base": 0.05, "random_low": 0.0, "random_high": 0.05 + 0.2 * strength,
                            "perplexity_ratio": 1 + (1 + i % 3) * strength**2,
                            "random_perplexity": 1 + strength**2,
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)


def chosen(n, steers=None):
    frame = pd.DataFrame({"layer": 2, "strength": 0.5}, index=pd.Index(named(n), name="concept"))
    steered = np.arange(n) < n / 2 if steers is None else np.full(n, steers)
    return frame.assign(steers=steered, target=0.8, perplexity_ratio=1.4, verdict="does so: ...")


def effects(n, targets=1):
    shift = np.random.default_rng(0).normal(0, 0.5, n)
    shift[:targets] = 3.2
    frame = pd.DataFrame(
        {"shift": shift, "random": 0.4, "target": np.arange(n) < targets},
        index=pd.Index(named(n), name="concept"),
    )
    return frame.sort_values("shift", key=lambda s: -s.abs())


def words(figure):
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(plt.Text) if text.get_text()]


def title(figure):
    found = [figure.get_suptitle(), *(ax.get_title("left") for ax in figure.axes)]
    return next(text for text in found if text).replace("\n", " ")


@pytest.mark.parametrize("n", [1, 6, 7, 200])
def test_doses_show_every_concept_and_where_it_was_chosen(n):
    figure = steering_dose(cells(n), chosen(n))
    above = figure.axes[0]
    lines = [line for ax in figure.axes for line in ax.lines]
    marks = [line for line in lines if line.get_marker() == "D"]
    assert len(marks) == 2 * n
    assert {float(line.get_xdata()[0]) for line in marks} == {0.5}
    curves = {tuple(np.round(line.get_ydata(), 6)) for line in lines if len(line.get_xdata()) == 6}
    frame = cells(n)
    frame = frame[(frame["layer"] == 2) & (frame["split"] == "held_out")]
    for concept in (named(n)[0], named(n)[-1]):
        rows = frame[frame["concept"] == concept]
        assert (0.05, *np.round(rows["target"], 6)) in curves
        assert (1.0, *np.round(rows["perplexity_ratio"], 6)) in curves
    assert above.get_ylim()[1] > 1
    names = " ".join(words(figure))
    assert "anticipatory grief" in names
    assert named(n)[-1].replace("_", " ") in names


def test_doses_count_who_steers():
    assert title(steering_dose(cells(20), chosen(20))).startswith("10 of 20 concepts steer: median")
    assert title(steering_dose(cells(3), chosen(3, True))).startswith("All 3 concepts steer")
    assert title(steering_dose(cells(3), chosen(3, False))) == "None of 3 concepts steers"
    assert title(steering_dose(cells(1), chosen(1))) == "Anticipatory grief does so: ..."
    assert title(steering_dose(cells(3), chosen(3), title="Mine")) == "Mine"


def test_doses_may_be_negative():
    figure = steering_dose(cells(2, strengths=(-0.5, 0.5)), chosen(2))
    curve = next(line for line in figure.axes[0].lines if len(line.get_xdata()) == 3)
    assert list(curve.get_xdata()) == [-0.5, 0.0, 0.5] and curve.get_ydata()[1] == 0.05


def test_depth_frames_the_best_fluent_cell_and_hatches_what_is_not():
    figure = steering_depth(cells(1, strengths=(0.4, 0.9, 1.2)))
    ax = figure.axes[0]
    image = ax.images[0].get_array()
    assert image.shape == (3, 3) and image[1, 2] == pytest.approx(1)
    framed = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_edgecolor()[:3] == ORANGE]
    assert [(p.get_x(), p.get_y()) for p in framed] == [(0.5, 0.5)], "layer 2, strength 0.9"
    assert {patch.get_x() for patch in ax.patches if patch.get_hatch()} == {1.5}, "strength 1.2"
    assert title(figure) == (
        "Steering works best at layer 2, strength 0.9: target 1.00, perplexity x1.81"
    )


def test_depth_takes_the_median_concept_on_the_prompts_that_are_reported():
    frame = cells(5)
    image = steering_depth(frame).axes[0].images[0].get_array()
    held_out = frame[(frame["split"] == "held_out") & (frame["layer"] == 1)]
    assert image[0].tolist() == held_out.groupby("strength")["target"].median().tolist()


def test_depth_says_so_if_text_suffers_everywhere():
    frame = cells(3).assign(perplexity_ratio=3.0)
    assert title(steering_depth(frame)) == "No push leaves the perplexity ratio below 2"


@pytest.mark.parametrize("layers", [range(-1, 64), [2]])
def test_depth_can_be_read_for_one_layer_and_for_many(layers):
    figure = steering_depth(cells(2, layers=layers))
    figure.draw_without_rendering()
    ticks = [t.get_window_extent() for t in figure.axes[0].get_yticklabels() if t.get_text()]
    assert all(b.y0 >= a.y1 - 1 for a, b in zip(ticks, ticks[1:], strict=False))


@pytest.mark.parametrize("n", [1, 5, 20, 200])
def test_side_effects_show_the_target_and_the_farthest_of_the_others(n):
    frame = effects(n)
    figure = side_effects(frame)
    ax = figure.axes[0]
    figure.draw_without_rendering()
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels[0] == "anticipatory grief" and len(labels) == min(n, 17)
    widths = [patch.get_width() for patch in ax.patches[len(labels) :]]
    assert widths[0] == pytest.approx(3.2)
    others = frame["shift"].iloc[1:]
    assert sorted(map(abs, widths[1:])) == pytest.approx(sorted(others.abs().nlargest(16)))
    boxes = [text.get_window_extent() for text in ax.get_yticklabels()]
    assert all(a.y0 >= b.y1 - 1 for a, b in zip(boxes, boxes[1:], strict=False))
    if n == 200:
        assert "and 183 others by" in title(figure)


def test_side_effects_of_several_at_once_name_each():
    assert title(side_effects(effects(20, targets=2))).startswith(
        "The push moves anticipatory grief by +3.20 and torschlusspanik by +3.20, "
    )


def test_figures_can_be_drawn_into_axes_of_ones_own():
    _, axes = plt.subplots(1, 2)
    assert steering_depth(cells(2), ax=axes[0]) is side_effects(effects(5), ax=axes[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: steering_dose(cells(2).drop(columns="base"), chosen(2)), "needs the columns base"),
        (lambda: steering_dose(cells(2), chosen(3)), "calm \\+ curious are in one of them"),
        (lambda: steering_dose(cells(2)[:0], chosen(2)), "empty frame"),
        (lambda: steering_dose(cells(2).assign(target=np.nan), chosen(2)), "nothing to draw"),
        (lambda: steering_depth(cells(2).drop(columns="layer")), "needs the columns layer"),
        (lambda: side_effects(effects(5).drop(columns="random")), "needs the columns random"),
        (lambda: side_effects(pd.concat([effects(2)] * 2)), "one row per concept"),
    ],
)
def test_frames_that_cannot_be_drawn_are_refused(call, message):
    with pytest.raises(AmygdalaError, match=message):
        call()
