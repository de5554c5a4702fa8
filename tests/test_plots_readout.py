"""Readouts as coloured text and over time: legible, and nothing in a text can break them."""

import re
from html.parser import HTMLParser

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amygdala_lib import AmygdalaError
from amygdala_lib.plots.readout import HIGH, LOW, OPAQUE, coloured_tokens, top_states

STORY = "A cart stood by the gate. Over and over she thought that there was danger in the dark."


pytestmark = pytest.mark.usefixtures("quiet_figures")


def readings(n_tokens, n_concepts, seed=0):
    """Noise, with one concept that rises early and one that rises late."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n_tokens, n_concepts))
    place = np.arange(n_tokens) / n_tokens
    values[:, 0] += 4 * np.exp(-((place - 0.3) ** 2) / 0.01)
    values[:, 1] += 4 * np.exp(-((place - 0.8) ** 2) / 0.01)
    names = ["afraid", "happy", *(f"state_{i}" for i in range(2, n_concepts))]
    words = STORY.split(" ")
    tokens = [f" {words[i % len(words)]}" for i in range(n_tokens)]
    return pd.DataFrame(values, pd.Index(tokens, name="token"), names)


class Parsed(HTMLParser):
    """The spans of the text, as (words, style, title), and whether all that opens closes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.spans, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self.open[-1]
        if tag == "span" and "title" in attributes:
            self.spans.append((data, attributes["style"], attributes["title"]))
            self.text += data


# Coloured text


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=8), st.floats(-9, 9)), min_size=1, max_size=12)
)
def test_whatever_the_tokens_hold_they_are_shown_as_they_are(pairs):
    tokens = [re.sub(r"\r", "", token) or "x" for token, _ in pairs]
    tokens = [token.replace("\x00", "0") for token in tokens]
    page = coloured_tokens(tokens, [value for _, value in pairs], "calm")
    assert Parsed(page).text == "".join(tokens)


def test_markup_in_a_text_or_a_name_stays_text():
    page = coloured_tokens(["<script>alert(1)</script>", '" onload="x'], [1, -1], '<b>"calm"&')
    assert "<script" not in page and '<b>"calm' not in page
    found = Parsed(page)
    assert found.text == '<script>alert(1)</script>" onload="x'
    assert {tag for tag, _ in re.findall(r"<(\w+)([ >])", page)} <= {
        "figure", "div", "span", "figcaption", "b"
    }  # fmt: skip


def test_red_is_above_nought_blue_below_and_the_colour_grows_with_the_value():
    values = [2.0, 1.0, 0.0, -1.0, -2.0, 50.0, np.nan]
    spans = Parsed(coloured_tokens([*"abcdefg"], values, "calm", limit=2.0)).spans
    colours = [re.findall(r"rgba\((\d+), (\d+), (\d+), ([\d.]+)\)", style) for _, style, _ in spans]
    seen = [tuple(map(float, found[0])) for found in colours[:-1]]
    assert [colour[:3] for colour in seen] == [HIGH, HIGH, LOW, LOW, LOW, HIGH]
    assert [colour[3] for colour in seen] == [OPAQUE, OPAQUE / 2, 0, OPAQUE / 2, OPAQUE, OPAQUE]
    assert not colours[-1] and "underline" in spans[-1][1], "what was not read has no colour"
    assert spans[0][2] == "calm +2.00" and "not read" in spans[-1][2]


def test_colours_and_what_they_mean_are_also_told_in_words():
    page = coloured_tokens([" rain", " door", " sun"], [0.5, 3.0, -2.0], "at_ease")
    label = re.search(r'aria-label="([^"]*)"', page)[1]
    assert "at ease" in label and "Highest at “door” (+3.00), lowest at “sun” (-2.00)" in label
    assert "standard deviations" in page and "linear-gradient" in page


@pytest.mark.parametrize(
    ("tokens", "place", "word"),
    [
        (["A", " pound", "ing", " heart", "."], 2, "pounding"),
        (["A", " pound", "ing", " heart", "."], 1, "pounding"),
        (["A", " pound", "ing", " heart", "."], 4, "."),
        (["A", "pound", "ing"], 2, "ing"),  # of these nobody knows which belong together
    ],
)
def test_a_part_of_a_word_is_told_as_the_word(tokens, place, word):
    values = [1.0 if i == place else 0.0 for i in range(len(tokens))]
    assert f"Highest at “{word}” (" in coloured_tokens(tokens, values, "calm")
    frame = pd.DataFrame({"calm": values}, tokens)
    title = top_states(frame).axes[0].get_title(loc="left")
    assert title.replace("\n", " ") == f"calm peaks around “{word}” (+1.00)"


def luminance(colour):
    channels = np.array(colour) / 255
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("colour", [HIGH, LOW])
@pytest.mark.parametrize(
    ("text", "page"), [((33, 33, 33), (255, 255, 255)), ((255, 255, 255), (17, 17, 17))]
)
def test_text_keeps_its_contrast_on_the_strongest_colours_of_both_modes(colour, text, page):
    """WCAG 2.1 asks for 4.5; the colours of text and page are JupyterLab's, light and dark."""
    behind = OPAQUE * np.array(colour) + (1 - OPAQUE) * np.array(page)
    light, dark = sorted([luminance(text), luminance(behind)], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_no_colour_of_text_or_page_is_fixed():
    page = coloured_tokens(["a"], [1.0], "calm")
    assert not re.search(r"(?<![-\w])(black|white)(?!-)|#\w{3,6}", page)
    assert "var(--jp-content-font-color1, inherit)" in page


@pytest.mark.parametrize(
    ("tokens", "values", "said"),
    [
        ([], [], "0 tokens"),
        (["a"], [1.0, 2.0], "1 tokens, values (2,)"),
        (["a", "b"], [1.0, np.inf], "1 values are infinite"),
    ],
)
def test_values_that_do_not_fit_are_refused(tokens, values, said):
    with pytest.raises(AmygdalaError, match=re.escape(said)):
        coloured_tokens(tokens, values, "calm")


def test_a_text_of_which_nothing_was_read_can_be_shown():
    assert "No token was read" in coloured_tokens(["a", "b"], [np.nan, np.nan], "calm")
    assert Parsed(coloured_tokens(["a"], [0.0], "calm")).text == "a"


# Over time


def overlapping(figure, texts):
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    return [
        (a.get_text(), b.get_text())
        for i, (a, x) in enumerate(zip(texts, boxes, strict=True))
        for b, y in zip(texts[i + 1 :], boxes[i + 1 :], strict=True)
        if x.shrunk(0.98, 0.9).overlaps(y.shrunk(0.98, 0.9))
    ]


@pytest.mark.parametrize("n_concepts", [2, 20, 200])
@pytest.mark.parametrize("n_tokens", [1, 10, 60, 300])
def test_top_states_are_legible(n_tokens, n_concepts):
    figure = top_states(readings(n_tokens, n_concepts), written_from=n_tokens // 2)
    ax = figure.axes[0]
    names = [text for text in ax.texts if "written" not in text.get_text()]
    assert len(names) == min(6, n_concepts)
    assert not overlapping(figure, names)
    figure.draw_without_rendering()
    whole = figure.bbox
    for text in [*names, *ax.get_xticklabels(), ax._left_title]:
        box = text.get_window_extent()
        assert box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1, text.get_text()
        assert box.y1 <= whole.y1 + 1
    assert len(ax.get_xticks()) <= 40


def test_the_states_with_the_highest_peaks_are_named_and_the_title_says_when():
    figure = top_states(readings(60, 20), most=3)
    ax = figure.axes[0]
    assert {"afraid", "happy"} <= {text.get_text() for text in ax.texts}
    assert re.match(r"afraid peaks around .* then happy peaks around", ax.get_title(loc="left"))


def test_a_last_token_that_was_not_read_is_no_state():
    values = readings(30, 20)
    values.iloc[-1] = np.nan
    lines = top_states(values).axes[0].lines
    named = [line for line in lines if len(line.get_xdata()) == 30]
    assert len(named) == 6
    assert all(np.isnan(line.get_ydata()[-1]) for line in named)
    assert all(np.isfinite(line.get_ydata()[:-1]).all() for line in named)


def test_formulas_in_a_text_are_text():
    values = readings(4, 3)
    values.index = ["$x", "y$", "$z^2$", "\\frac\x1a"]
    top_states(values).draw_without_rendering()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (pd.DataFrame(), "empty"),
        (pd.DataFrame({"calm": [np.nan, np.nan]}, ["a", "b"]), "all 2 values are missing"),
    ],
)
def test_nothing_to_draw_is_refused(values, said):
    with pytest.raises(AmygdalaError, match=said):
        top_states(values)
