"""The panels of notebooks 08 and 09 as people meet them: in JupyterLab, with a mouse."""

import json
import re
import shutil

import pytest

from amygdala_lib.artefacts import repository_root
from amygdala_lib.cli import main

pytestmark = pytest.mark.slow
RUN = "test-jupyterlab"
QUICK = {
    "08_steering": {
        "run": RUN,
        "states": "afraid calm",
        "together": "afraid calm",
        "steered_layers": "2",
        "strengths": "0.3 0.5",
        "n_prompts": 2,
        "new_tokens": 12,
        "random_draws": 1,
    },
    "09_readout": {"run": RUN, "new_tokens": 20},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on copies of the notebooks, with quicker parameters, and what 02 makes of them."""
    from lab import jupyterlab

    folder = tmp_path_factory.mktemp("notebooks")
    for name, parameters in QUICK.items():
        text = (repository_root() / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
        (folder / f"{name}.ipynb").write_text(with_parameters(text, parameters), encoding="utf-8")
    try:
        made = ["extract", "--corpus", "affect_world", "--pool", "mean", "--run", RUN]
        assert main([*made, "--layers", "2,4,5,6"]) == 0
        with jupyterlab(folder, tmp_path_factory.mktemp("settings")) as running:
            yield running
    finally:
        shutil.rmtree(repository_root() / "runs" / RUN, ignore_errors=True)


def with_parameters(text: str, parameters: dict) -> str:
    notebook = json.loads(text)
    cell = next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    source = "".join(cell["source"])
    for name, value in parameters.items():
        source, found = re.subn(rf"^{name} = .*?(?=  #)", f"{name} = {value!r}", source, flags=re.M)
        assert found == 1, f"no parameter {name}"
    cell["source"] = source
    return json.dumps(notebook)


def drag(page, handle, by: int) -> None:
    """Take a slider's handle and let go of it `by` pixels further right."""
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by, y, steps=5)
    page.mouse.up()


def pictures(lab, panel, folder, name: str) -> None:
    """In both themes; pytest --basetemp=DIR keeps them to look at."""
    for theme in ("light", "dark"):
        lab.use_theme(theme)
        panel.screenshot(path=folder / f"{name}_{theme}.png")


def test_dragging_a_slider_writes_the_story_anew(lab, tmp_path):
    page = lab.open("08_steering.ipynb", "light")
    lab.run_all(900)
    panel = page.locator(".jp-OutputArea-output:has(.widget-slider)").first
    panel.scroll_into_view_if_needed()
    steered = panel.locator("section[aria-label^='Steered']")
    steered.locator("svg").wait_for()  # comes when the text is done
    before, label = steered.inner_text(), steered.get_attribute("aria-label")
    assert "afraid" in label

    drag(page, panel.locator(".widget-slider:has-text('afraid') .noUi-handle"), -150)
    changed = f"section[aria-label^='Steered']:not([aria-label='{label}']) svg"
    panel.locator(changed).wait_for()
    assert steered.inner_text() != before
    pictures(lab, panel, tmp_path, "steering")

    panel.get_by_role("button", name="Reset").click()
    unsteered = panel.locator("section[aria-label='Unsteered']")
    panel.locator("section[aria-label='Steered: all strengths are 0'] svg").wait_for()
    told = [section.inner_text().split("\n", 1)[1] for section in (steered, unsteered)]
    assert told[0] == told[1], "at 0 both are the same text"


def test_a_text_that_is_typed_is_read(lab, tmp_path):
    page = lab.open("09_readout.ipynb", "light")
    lab.run_all(900)
    panel = page.locator(".jp-OutputArea-output:has(textarea)").first
    panel.scroll_into_view_if_needed()
    panel.locator("svg").first.wait_for()
    box = panel.locator("textarea")
    box.fill("The wind came from the west and nobody spoke.")
    box.blur()
    panel.locator("section:has-text('nobody spoke')").wait_for()
    pictures(lab, panel, tmp_path, "readout")
