"""What every committed notebook promises its reader and the runner."""

import io
import re
import tokenize
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from amygdala_lib.notebook_sources import (
    ROOT,
    declared_parameters,
    find_notebooks,
    navigation_bar,
    read_notebook,
)

LONGEST_CELL = 18  # lines; longer ones are library code in disguise


def problems(path: Path, siblings: list[Path]) -> list[str]:
    """Everything about a notebook that breaks the contract."""
    notebook = read_notebook(path)
    found = []
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        found.append(f"invalid: {error.message}")
    if not re.fullmatch(r"\d\d_[a-z][a-z0-9_]*\.ipynb", path.name):
        found.append("name is not NN_name.ipynb")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("kernelspec is not python3")
    if any("id" not in cell for cell in notebook.cells) or notebook.nbformat_minor < 5:
        found.append("cells without ids")

    markdown = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    titles = [line for text in markdown for line in text.splitlines() if line.startswith("# ")]
    first = notebook.cells[0]
    if len(titles) != 1 or not first.source.startswith("# ") or first.cell_type != "markdown":
        found.append("the title is not one H1 at the top of the first cell")
    bars = [text for text in markdown if "<!-- nav -->" in text]
    if bars != [first.source] or navigation_bar(path, siblings) not in first.source:
        found.append("navigation bar is not up to date: python -m amygdala_lib.notebooks nav")

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        lines = cell.source.count("\n") + 1
        if lines > LONGEST_CELL:
            found.append(f"a cell of {lines} lines: {cell.source.splitlines()[0]}")
        if not cell.source.strip():
            found.append("an empty cell")
        if cell.outputs or cell.execution_count is not None:
            found.append("outputs or execution counts: nbstripout --keep-id")
        if "raises-exception" in cell.metadata.get("tags", []):
            found.append("a cell may raise, which fails the run all the same")
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(parameters) != 1:
        found.append(f"{len(parameters)} cells tagged parameters")
    elif "run" not in declared_parameters(path):  # which checks for bare literals
        found.append("no parameter `run`")
    for cell in parameters:
        tokens = list(tokenize.generate_tokens(io.StringIO(cell.source).readline))
        commented = {t.start[0] for t in tokens if t.type == tokenize.COMMENT}
        statements = {t.start[0] for t in tokens if t.type == tokenize.NEWLINE}
        if statements - commented or len(statements) != len(cell.source.strip().splitlines()):
            found.append("parameters are not one per line, each with a comment")
    return found


@pytest.mark.parametrize("path", find_notebooks(), ids=lambda path: path.stem)
def test_notebook(path):
    assert problems(path, find_notebooks()) == []


def test_the_first_is_the_one_that_make_lab_opens_and_numbers_are_unique():
    names = [path.name for path in find_notebooks()]
    assert names[0] == "00_start_here.ipynb"
    assert "notebooks/00_start_here.ipynb" in (ROOT / "Makefile").read_text()
    assert len({name[:2] for name in names}) == len(names)


def good_notebook():
    bar = "<!-- nav -->\n\n<!-- /nav -->"
    parameters = new_code_cell('run = "demo"  # folder', metadata={"tags": ["parameters"]})
    return new_notebook(
        cells=[new_markdown_cell(f"# Title\n\n{bar}"), parameters, new_code_cell("1 + 1")],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )


def damage_bar(nb):
    nb.cells[0].source = nb.cells[0].source.replace("<!-- /nav", "[old](old.ipynb)\n<!-- /nav")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda nb: None, None),
        (damage_bar, "navigation bar"),
        (lambda nb: nb.cells[1].update(source="run = 'demo'"), "each with a comment"),
        (lambda nb: nb.cells[1].update(source="# folder\nrun = 'demo'"), "each with a comment"),
        (lambda nb: nb.cells[1].update(source="seed = 0  # seed"), "no parameter `run`"),
        (lambda nb: nb.cells[1].metadata.pop("tags"), "0 cells tagged parameters"),
        (lambda nb: nb.cells[2].metadata.update(tags=["parameters"]), "2 cells tagged"),
        (lambda nb: nb.cells[2].metadata.update(tags=["raises-exception"]), "may raise"),
        (lambda nb: nb.cells[2].update(execution_count=1), "execution counts"),
        (lambda nb: nb.cells[2].update(source="x = 1\n" * 20), "a cell of 21 lines"),
        (lambda nb: nb.cells[2].update(source=" "), "an empty cell"),
        (lambda nb: nb.cells.append(new_markdown_cell("# Second")), "one H1"),
        (lambda nb: nb.metadata.kernelspec.update(name="other"), "kernelspec"),
        (lambda nb: nb.update(nbformat_minor=4), "ids"),
    ],
)
def test_each_breach_is_found(tmp_path, damage, said):
    path = tmp_path / "00_start.ipynb"
    notebook = good_notebook()
    damage(notebook)
    path.write_text(nbformat.writes(notebook))
    found = problems(path, [path])
    if said is None:
        assert found == []
    else:
        assert any(said in problem for problem in found), found


def test_a_wrong_file_name_is_found(tmp_path):
    path = tmp_path / "start.ipynb"
    nbformat.write(good_notebook(), path)
    assert problems(path, [path]) == ["name is not NN_name.ipynb"]
