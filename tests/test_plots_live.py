"""The figure of a served training job shows its numbers, says what they mean, and can be read."""

import math

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")


from amygdala_lib import AmygdalaError
from amygdala_lib.plots import served_training

SCORES = pd.DataFrame({"time": [0.0, 4.0, 8.0, 12.0], "log_probability": [-3.0, -3.0, -1.5, -0.5]})
REQUESTS = pd.DataFrame(
    {"start": [0.0, 1.0, 5.0, 6.0, 7.0, 11.0], "seconds": [0.2, 0.4, 0.9, 0.7, 0.8, 0.25]}
)


pytestmark = pytest.mark.usefixtures("quiet_figures")


def test_what_is_drawn_is_what_was_measured():
    figure = served_training(SCORES[::-1], REQUESTS, (4.0, 10.0))
    top, bottom = figure.axes
    assert top.lines[0].get_xydata().tolist() == SCORES.to_numpy().tolist()
    assert bottom.collections[0].get_offsets().tolist() == REQUESTS.to_numpy().tolist()
    lines = [c.get_segments()[0] for c in bottom.collections[1:]]
    assert [line[0, 1] for line in lines] == pytest.approx([0.3, 0.8, 0.25])
    assert [line[:, 0].tolist() for line in lines] == [[0, 4], [4, 10], [10, 11.25]]
    for ax in (top, bottom):
        (shade,) = ax.patches
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == (4.0, 10.0)
    said = " ".join(figure._suptitle.get_text().split())
    assert "from -3.00 to -0.50" in said
    assert "0.30 s before, 0.80 s during, 0.25 s after" in said
    assert served_training(SCORES, REQUESTS, (4, 10), title="mine")._suptitle.get_text() == "mine"


def test_spans_without_a_request_are_left_out():
    figure = served_training(SCORES, REQUESTS[2:5], (4.0, 10.0))
    said = " ".join(figure._suptitle.get_text().split())
    assert said.endswith("a request takes 0.80 s during")
    assert len(figure.axes[1].collections) == 2


def test_many_requests_can_still_be_drawn():
    rng = np.random.default_rng(0)
    many = pd.DataFrame({"start": rng.uniform(0, 60, 5000), "seconds": rng.lognormal(-1, 1, 5000)})
    served_training(SCORES, many, (20.0, 40.0)).canvas.draw()


@pytest.mark.parametrize(
    ("scores", "requests", "job", "said"),
    [
        (SCORES.drop(columns="time"), REQUESTS, (4, 10), "time"),
        (SCORES, REQUESTS.drop(columns="seconds"), (4, 10), "seconds"),
        (SCORES[:0], REQUESTS, (4, 10), "empty"),
        (SCORES, REQUESTS[:0], (4, 10), "empty"),
        (SCORES.assign(log_probability=math.nan), REQUESTS, (4, 10), "nothing to draw"),
        (SCORES, REQUESTS, (10, 4), "began and ended"),
        (SCORES, REQUESTS, (math.nan, 4), "began and ended"),
    ],
)
def test_what_cannot_be_drawn_is_said(scores, requests, job, said):
    with pytest.raises(AmygdalaError, match=said):
        served_training(scores, requests, job)
