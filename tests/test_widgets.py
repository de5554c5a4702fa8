"""Panels do what their controls say, for the last request only, and leave the model alone."""

import math
import re
import threading
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from torch.nn.functional import normalize

from amygdala_lib import Directions, Readout, steer
from amygdala_lib.errors import ModelError, SteeringError
from amygdala_lib.widgets import ReadoutPanel, SteeringPanel
from amygdala_lib.widgets.continuation import Continuation
from amygdala_lib.widgets.drawing import draw_comparison, draw_reading, steering_phrase
from amygdala_lib.widgets.frontend import has_front_end
from amygdala_lib.widgets.latest import Latest
from amygdala_lib.widgets.model import with_own_hooks

PROMPT = "The kettle took its time, and"
LAYERS = [1, 3]
CONCEPTS = ["calm", "afraid", "at_ease"]


@pytest.fixture
def lm(loaded):
    return loaded("qwen3")


@pytest.fixture
def dirs(lm):
    return directions_of(lm)


def directions_of(lm):
    generator = torch.Generator().manual_seed(0)
    return Directions(
        concepts=CONCEPTS,
        vectors={n: normalize(torch.randn(3, 64, generator=generator)) for n in LAYERS},
        residual_norms=dict.fromkeys(LAYERS, 10.0),
        means={n: torch.zeros(3) for n in LAYERS},
        stds={n: torch.ones(3) for n in LAYERS},
        provenance={"model": lm.name},
    )


@pytest.fixture
def panel(lm, dirs):
    made = SteeringPanel(
        lm, dirs, {"calm": 0.5, "afraid": 0.0}, prompt=PROMPT, tokens=12, layers=[1]
    )
    yield made
    made.close()


def logits(lm, text=PROMPT):
    with torch.no_grad():
        return lm.model(**lm.tokenizer(text, return_tensors="pt")).logits


def texts(page):
    """The unsteered and the steered text that a page shows."""
    found = []
    for section in page.split("<section")[1:]:
        spans = re.findall(r'<span style="[^"]*" title="[^"]*">(.*?)</span>', section, re.S)
        found.append("".join(spans))
    return found


def shown(panel):
    assert panel.wait(120)
    assert panel.status.value == "", panel.status.value
    return panel.output.value


def holding(panel):
    """Let the panel's model stop at every forward until the event is set."""
    go = threading.Event()
    begun = threading.Event()

    def hold(*_):
        begun.set()
        go.wait(60)

    panel._lm.model.register_forward_pre_hook(hold)
    return begun, go


# Only the last request counts


def test_a_job_that_waits_is_dropped_and_one_that_runs_is_told():
    done, begun, go = [], threading.Event(), threading.Event()

    def long(replaced):
        begun.set()
        go.wait(10)
        done.append(("long", replaced()))

    latest = Latest(on_error=lambda error: done.append(error))
    latest.submit(long)
    begun.wait(10)
    latest.submit(lambda replaced: done.append("never"))
    latest.submit(lambda replaced: done.append(("last", replaced())))
    go.set()
    assert latest.wait(10)
    assert done == [("long", True), ("last", False)]


def test_an_error_is_handed_on_and_the_next_job_runs():
    found = []
    latest = Latest(on_error=found.append)
    latest.submit(lambda replaced: 1 / 0)
    assert latest.wait(10) and isinstance(found[0], ZeroDivisionError)
    latest.submit(lambda replaced: found.append("next"))
    assert latest.wait(10) and found[1:] == ["next"]


def test_a_job_that_was_cancelled_is_told_and_its_error_dropped():
    found, begun, go = [], threading.Event(), threading.Event()

    def failing(replaced):
        begun.set()
        go.wait(10)
        found.append(replaced())
        raise ValueError

    latest = Latest(on_error=found.append)
    latest.submit(failing)
    begun.wait(10)
    latest.cancel()
    go.set()
    assert latest.wait(10) and found == [True]


# A model with hooks of its own


def test_a_panels_model_has_the_same_weights_and_its_own_hooks(loaded):
    for family in ("qwen3", "qwen3_5", "gpt2"):
        lm = loaded(family)
        before = logits(lm)
        own = with_own_hooks(lm)
        assert torch.equal(logits(own), before)
        mine, theirs = dict(own.model.named_parameters()), dict(lm.model.named_parameters())
        assert all(mine[name] is theirs[name] for name in theirs)
        with steer(own, directions_of(lm), {"calm": 1.0}, layers=[1]):
            assert torch.equal(logits(lm), before)
            assert not torch.equal(logits(own), before)


def test_hooks_that_are_set_are_not_taken_along(lm, dirs):
    before = logits(lm)
    with steer(lm, dirs, {"calm": 1.0}), Readout(dirs).attach(lm) as live:
        own = with_own_hooks(lm)
        assert torch.equal(logits(own), before)
        assert not torch.equal(logits(lm), before)
        own.model.generate(**own.tokenizer("Rain", return_tensors="pt"), max_new_tokens=2)
    assert len(live.frame().sequence.unique()) == 1


def test_training_in_place_reaches_the_panel(lm):
    own, weight = with_own_hooks(lm), lm.model.get_input_embeddings().weight
    before = logits(own)
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1.5)
        assert torch.equal(logits(own), logits(lm)) and not torch.equal(logits(own), before)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


# Drawing


def continuation(shift=0.0):
    tokens = [" The", " kettle", " <b>sang</b>", " and", " sang"]
    values = [[shift + i / 2, 1 - i, 0.1] for i in range(4)] + [[math.nan] * 3]
    return Continuation(pd.DataFrame(values, tokens, CONCEPTS), written_from=2)


def test_a_picture_depends_on_nothing_but_its_values():
    values = (continuation(), continuation(1.0), "calm", "calm +0.50 at layer 1 of 5 (20%)")
    page = draw_comparison(*values)
    assert page == draw_comparison(*values)
    assert page.count("<section") == 2 and page.count("<svg") == 2
    assert texts(page) == [" The kettle &lt;b&gt;sang&lt;/b&gt; and sang"] * 2
    assert "Steered: calm +0.50 at layer 1 of 5 (20%)" in page
    assert "<svg" not in draw_comparison(*values, figures=False)


def test_two_pictures_on_one_page_do_not_share_their_parts():
    pages = [draw_reading(continuation(shift).zscores, "calm") for shift in (0.0, 3.0)]
    ids = [re.findall(r' id="([^"]+)"', page) for page in pages]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    for page, known in zip(pages, ids, strict=True):
        assert len(known) == len(set(known))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(known)


def test_both_texts_are_coloured_on_one_scale():
    page = draw_comparison(continuation(), continuation(5.0), "calm", "calm")
    scales = re.findall(r"standard deviations: ([-+.\d]+)", page)
    assert len(scales) == 2 and len(set(scales)) == 1


def test_a_picture_follows_the_colours_of_the_page():
    page = draw_reading(continuation().zscores, "calm")
    assert "currentColor" in page and "var(--jp-content-font-color1" in page
    assert not re.search(r"#000000|#ffffff|(fill|color): (black|white)|<style", page)
    assert re.search(r'<svg [^>]*role="img" aria-label="[^"]*peaks around', page)


def test_a_picture_of_what_is_yet_to_come():
    empty = Continuation(continuation().zscores.iloc[:0], 2)
    for plain, steered in [(None, continuation()), (None, None), (empty, None)]:
        page = draw_comparison(plain, steered, "calm", "calm", figures=False)
        assert page.count("<section") == 2


def test_what_was_done_is_said_in_words():
    strengths = {"at_ease": 0.5, "afraid": -0.25, "calm": 0.0}
    assert (
        steering_phrase(strengths, (2,), 8) == "at ease +0.50, afraid -0.25 at layer 2 of 8 (25%)"
    )
    phrase = steering_phrase(strengths, (2, 4), 8)
    assert phrase.endswith("at 2 layers, layer 2 of 8 (25%) to layer 4 of 8 (50%)")
    assert steering_phrase({"calm": 0.0}, (2,), 8) == "all strengths are 0"


# The steering panel


def test_a_slider_changes_the_steered_text_and_not_the_other(panel):
    panel.start()
    plain, steered = texts(shown(panel))
    assert plain.startswith(PROMPT) and steered.startswith(PROMPT) and plain != steered
    panel.sliders["afraid"].value = 1.0
    plain_again, steered_again = texts(shown(panel))
    assert plain_again == plain and steered_again != steered
    assert "calm +0.50, afraid +1.00 at layer 1 of 5 (20%)" in panel.output.value


def test_without_strengths_both_texts_are_the_same(panel):
    panel.sliders["calm"].value = 0.0
    plain, steered = texts(shown(panel))
    assert plain == steered and "all strengths are 0" in panel.output.value


@pytest.mark.parametrize(
    ("control", "value"), [("prompt", "Rain"), ("seed", 7), ("layers", (3, 3))]
)
def test_every_control_counts(panel, control, value):
    panel.start()
    before = texts(shown(panel))
    getattr(panel, control).value = value
    after = texts(shown(panel))
    assert after[1] != before[1]
    assert (after[0] != before[0]) == (control != "layers")


def test_the_layers_between_the_ends_of_the_range_are_steered(panel):
    panel.layers.value = (1, 3)
    assert "at 2 layers, layer 1 of 5 (20%) to layer 3 of 5 (60%)" in shown(panel)


def test_a_strength_that_was_set_back_leaves_nothing(panel, lm, dirs):
    panel.sliders["afraid"].value = 1.0
    shown(panel)
    panel.reset.click()
    assert [slider.value for slider in panel.sliders.values()] == [0.0, 0.0]
    page = shown(panel)
    assert len(set(texts(page))) == 1
    panel.sliders["calm"].value = 0.5
    fresh = SteeringPanel(lm, dirs, {"calm": 0.5}, prompt=PROMPT, tokens=12, layers=[1])
    fresh.start()
    assert texts(shown(panel)) == texts(shown(fresh))
    fresh.close()


def test_a_reset_is_one_request(panel):
    panel.sliders["afraid"].value = 0.25
    shown(panel)
    requests, start = [], panel.start

    def counted():
        requests.append([slider.value for slider in panel.sliders.values()])
        start()

    panel.start = counted
    panel.reset.click()
    shown(panel)
    assert requests == [[0.0, 0.0]]


def test_the_last_of_many_moves_wins_and_those_before_are_given_up(panel, lm, dirs):
    begun, go = holding(panel)
    hooks = [len(m._forward_hooks) for m in panel._lm.model.modules()]
    panel.start()
    assert begun.wait(60)
    for value in (0.1, 0.9, -0.4, 0.7):
        panel.sliders["calm"].value = value
    assert not panel.wait(0), "the slider does not wait for the text"
    read = []
    panel._lm.model.register_forward_hook(lambda *_: read.append(1))
    go.set()
    last = texts(shown(panel))
    assert len(read) < 3 * 12, "two texts of twelve tokens, and next to nothing of the others"
    fresh = SteeringPanel(
        lm, dirs, {"calm": 0.7, "afraid": 0.0}, prompt=PROMPT, tokens=12, layers=[1]
    )
    fresh.start()
    assert last == texts(shown(fresh))
    after = [len(m._forward_hooks) for m in panel._lm.model.modules()]
    assert sum(after) == sum(hooks) + 1, "no hook but this test's is left"
    fresh.close()


def test_cells_are_not_steered_while_the_panel_writes(panel, lm):
    before = logits(lm)
    begun, go = holding(panel)
    panel.start()
    assert begun.wait(60)
    assert torch.equal(logits(lm), before)
    go.set()
    shown(panel)
    assert torch.equal(logits(lm), before)


def test_an_error_is_shown_and_the_panel_goes_on(panel):
    panel.prompt.value = ""
    assert panel.wait(60)
    assert 'role="alert"' in panel.status.value and "write a few words" in panel.status.value
    panel.prompt.value = "word " * 300
    assert panel.wait(60) and "more than the 256" in panel.status.value
    panel.prompt.value = PROMPT
    assert len(texts(shown(panel))) == 2


def test_another_concept_colours_the_same_texts_anew(panel):
    panel.start()
    before = shown(panel)
    panel.colour.value = "at_ease"
    after = panel.output.value
    assert texts(after) == texts(before) and after != before
    assert "Text coloured by at ease" in after


def test_a_panel_that_is_closed_stops_writing(panel):
    begun, go = holding(panel)
    panel.start()
    assert begun.wait(60)
    panel.close()
    go.set()
    assert panel.wait(60)
    assert panel.output.value == ""


def test_every_control_is_labelled_and_moves_when_it_is_let_go(panel):
    for control in (*panel.sliders.values(), panel.prompt, panel.layers):
        assert control.description and not control.continuous_update
    assert panel.sliders["afraid"].tooltip.startswith("Strength of afraid")
    assert panel.seed.description and panel.colour.description and panel.reset.tooltip


def test_sliders_reach_as_far_as_their_first_values(lm, dirs):
    made = SteeringPanel(lm, dirs, {"calm": -2.5}, prompt=PROMPT)
    assert made.sliders["calm"].value == -2.5 and made.sliders["calm"].max == 2.5
    made.close()


def test_what_cannot_be_applied_is_refused_when_the_panel_is_made(lm, dirs):
    with pytest.raises(SteeringError, match="clam"):
        SteeringPanel(lm, dirs, {"clam": 0.5}, prompt=PROMPT)
    with pytest.raises(SteeringError, match="finite"):
        SteeringPanel(lm, dirs, {"calm": math.nan}, prompt=PROMPT)
    with pytest.raises(SteeringError, match="9"):
        SteeringPanel(lm, dirs, {"calm": 0.5}, prompt=PROMPT, layers=[9])
    with pytest.raises(ModelError, match="no directions at layers"):
        SteeringPanel(lm, dirs, {"calm": 0.5}, prompt=PROMPT, read_layer=2)


def test_another_models_directions_are_refused_unless_it_was_trained_from_that(lm, dirs):
    dirs.provenance["model"] = "base"
    for make in (
        lambda **other: SteeringPanel(lm, dirs, {"calm": 0.5}, prompt=PROMPT, tokens=4, **other),
        lambda **other: ReadoutPanel(lm, Readout(dirs), PROMPT, **other),
    ):
        with pytest.raises(ModelError, match="base"):
            make()
        made = make(allow_other_model=True)
        made.start()
        assert texts(shown(made))[0].startswith(PROMPT)
        made.close()


# The readout panel


def test_a_text_is_read_again_when_it_changes_and_only_then(lm, dirs):
    made = ReadoutPanel(lm, Readout(dirs), PROMPT)
    forwards = []
    made._lm.model.register_forward_hook(lambda *_: forwards.append(1))
    made.start()
    page = shown(made)
    assert texts(page)[0] == PROMPT and len(forwards) == 1
    others = [c for c in CONCEPTS if c != made.concept.value]
    made.concept.value = others[0]
    assert made.output.value != page and len(forwards) == 1
    page = made.output.value
    made.layer.value = next(n for n in LAYERS if n != made.layer.value)
    assert made.output.value != page and len(forwards) == 1
    made.text.value = "Rain on the roof"
    assert texts(shown(made))[0] == "Rain on the roof" and len(forwards) == 2
    made.close()


def test_the_first_concept_is_the_one_that_peaks_highest(lm, dirs):
    with Readout(dirs).attach(lm, layers=[3]) as live:
        logits(lm)
    highest = live.zscores().max().idxmax()
    others = [concept for concept in CONCEPTS if concept != highest]
    made = ReadoutPanel(lm, Readout(dirs.select([*others, highest])), PROMPT, layer=3)
    made.start()
    assert f"Text coloured by {highest.replace('_', ' ')}" in shown(made)
    assert made.concept.value == highest
    made.close()


def test_a_text_that_cannot_be_read_is_an_error_on_the_page(lm, dirs):
    made = ReadoutPanel(lm, Readout(dirs), "", concept="calm")
    made.start()
    assert made.wait(60) and "write a few words" in made.status.value
    with pytest.raises(ModelError, match="write a few words"):
        made.html()
    made.close()
    with pytest.raises(ModelError, match="'clam': do you mean calm"):
        ReadoutPanel(lm, Readout(dirs), PROMPT, concept="clam")


# Without a front end


def test_the_static_page_shows_what_the_controls_stand_for(panel, lm, dirs):
    assert not has_front_end()
    page = panel.html()
    panel.start()
    assert texts(page) == texts(shown(panel))
    assert f"Prompt: {PROMPT}" in page and page.count("<svg") == 2
    made = ReadoutPanel(lm, Readout(dirs), PROMPT)
    assert texts(made.html())[0] == PROMPT
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("opened", [False, True])
def test_a_kernel_shows_the_widget_to_somebody_and_a_picture_to_nobody(
    tmp_path, monkeypatch, opened
):
    """In a kernel as papermill starts it, and in one as a Jupyter server does."""
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    if opened:
        monkeypatch.setenv("JPY_SESSION_NAME", "08.ipynb")
    source = """
import amygdala_lib as amy
from amygdala_lib.widgets import SteeringPanel
lm = amy.load_model("demo")
acts = amy.capture(lm, ["I feel calm.", "I feel afraid."], [4], pool="mean", cache=None)
dirs = amy.Directions(
    ["calm"], {4: (acts[4][:1] - acts[4][1:]) / (acts[4][0] - acts[4][1]).norm()},
    acts.residual_norms, {4: acts[4].new_zeros(1)}, {4: acts[4].new_ones(1)}, {"model": "demo"},
)
panel = SteeringPanel(lm, dirs, {"calm": 0.3}, prompt="Anna came home.", tokens=8)
"""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in (source, "panel", "panel.wait(120)")]
    )
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (data,) = [output["data"] for output in notebook.cells[1].outputs if "data" in output]
    assert ("application/vnd.jupyter.widget-view+json" in data) == opened
    assert ("Steered: calm +0.30" in data.get("text/html", "")) != opened
    if opened:
        state = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
        pages = [str(model["state"].get("value", "")) for model in state.values()]
        assert any("Steered: calm +0.30" in page and "<svg" in page for page in pages)
    assert not list(Path(tmp_path).iterdir())
