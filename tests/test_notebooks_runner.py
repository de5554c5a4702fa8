"""The notebook runner, on small notebooks that really run."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from amygdala_lib.errors import AmygdalaError, NotebookError
from amygdala_lib.notebook_record import Record
from amygdala_lib.notebook_sources import (
    cast_parameter,
    declared_parameters,
    find_notebooks,
    write_navigation,
)
from amygdala_lib.notebooks import run_notebooks

PARAMETERS = 'run = "demo"  # the folder under runs/\nfactor = 2  # whole number'
WRITE = """
from pathlib import Path
made = Path("../runs") / run / "made"
made.mkdir(parents=True, exist_ok=True)
(made / "number.txt").write_text(str(21 * factor))
"""
READ = """
from pathlib import Path
number = int((Path("../runs") / run / "made" / "number.txt").read_text())
(Path("../runs") / run / "twice.txt").write_text(str(2 * number))
"""


def write_notebook(root: Path, name: str, *cells: str, parameters: str | None = PARAMETERS):
    kernel = {"name": "python3", "display_name": "Python 3"}
    notebook = new_notebook(metadata={"kernelspec": kernel})
    notebook.cells.append(new_markdown_cell(f"# {name}\n\nOne question.\n"))
    if parameters is not None:
        notebook.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    notebook.cells += [new_code_cell(cell.strip()) for cell in cells]
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


def results(outcomes) -> list[str]:
    return [outcome.result for outcome in outcomes]


@pytest.fixture
def two(tmp_path):
    """A repository of two notebooks, the second reading what the first made."""
    write_notebook(tmp_path, "00_write", WRITE)
    write_notebook(tmp_path, "01_read", READ)
    return tmp_path


def test_runs_in_order_and_leaves_notebook_page_and_summary(two, capsys):
    write_navigation(two)
    outcomes = run_notebooks(root=two)
    assert results(outcomes) == ["ran", "ran"]
    assert (two / "runs/demo/twice.txt").read_text() == "84"

    folder = two / "runs/demo/notebooks"
    executed = nbformat.read(folder / "00_write.ipynb", as_version=4)
    assert [c.execution_count for c in executed.cells if c.cell_type == "code"] == [1, 2, 3]
    page = (folder / "00_write.html").read_text()
    assert "<title>00_write</title>" in page
    assert 'href="01_read.html"' in page  # the bar leads from page to page
    summary = json.loads((folder / "summary.json").read_text())
    assert [entry["notebook"] for entry in summary["notebooks"]] == ["00_write", "01_read"]
    first, second = summary["notebooks"]
    assert first["seconds"] > 0 and first["peak_memory_mb"] > 10
    assert list(first["made"]) == ["runs/demo/made/number.txt"]
    assert second["reads"] == first["made"]
    assert summary["versions"]["torch"] and summary["format_version"] == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "00_write.html", "00_write.ipynb", "01_read.html", "01_read.ipynb", "summary.json"
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "peak memory" in printed and "runs/demo/notebooks" in printed


def make(two: Path, record: Record, stem: str, **files: str) -> None:
    """What the runner does around a notebook that writes `files` into the run."""
    path = two / "notebooks" / f"{stem}.ipynb"
    outcome = record.plan(path, {})
    before = record.files()
    for name, text in files.items():
        (two / "runs/demo").mkdir(parents=True, exist_ok=True)
        replacement = two / "runs/demo" / f".{name}"
        replacement.write_text(text)
        replacement.replace(two / "runs/demo" / name)
    for suffix in (".ipynb", ".html"):
        record.folder.mkdir(parents=True, exist_ok=True)
        (record.folder / f"{stem}{suffix}").touch()
    record.keep(outcome, before)


def why(two: Path, stem: str, **given) -> str:
    """The reason a later call gives for running the notebook."""
    record = Record(two, "demo")
    return record.why_run(record.plan(two / "notebooks" / f"{stem}.ipynb", given))


def test_content_decides_what_has_to_run(two):
    assert why(two, "00_write") == "for the first time"
    record = Record(two, "demo")
    make(two, record, "00_write", number="42")
    make(two, record, "01_read", twice="84")
    assert not why(two, "00_write") and not why(two, "01_read")

    for path in [*(two / "notebooks").iterdir(), two / "runs/demo/number"]:
        os.utime(path, (1, 1))  # dates do not count
    assert not why(two, "00_write") and not why(two, "01_read")
    assert why(two, "00_write", factor=3) == "because its parameters have changed"

    write_notebook(two, "00_write", WRITE + "# a remark")
    assert why(two, "00_write") == "because it has changed"
    make(two, record, "00_write", number="42")  # changed, but what it makes is the same
    assert not why(two, "01_read")
    make(two, record, "00_write", number="43")
    assert why(two, "01_read") == "because runs/demo/number has changed"

    make(two, record, "00_write")  # found its file and wrote nothing: still its own
    (two / "runs/demo/number").write_text("damaged")
    assert why(two, "00_write") == "because runs/demo/number, which it made, has changed"
    (two / "runs/demo/number").unlink()
    assert why(two, "00_write") == "because runs/demo/number, which it made, has changed"
    (record.folder / "01_read.html").unlink()
    make(two, record, "00_write", number="42")
    assert why(two, "01_read") == "because 01_read.html is not there"


def test_a_change_of_the_library_runs_everything(two, monkeypatch):
    make(two, Record(two, "demo"), "00_write")
    monkeypatch.setattr("amygdala_lib.notebook_record.PACKAGE", two / "notebooks")
    assert why(two, "00_write") == "because amygdala_lib has changed"


def test_a_folder_that_a_parameter_names_is_an_input(two):
    (two / "texts").mkdir()
    (two / "texts/calm.txt").write_text("still")
    write_notebook(two, "00_write", "1", parameters='texts = "texts"\nrun = "demo"\nother = "."')
    make(two, Record(two, "demo"), "00_write", anything="made")
    assert not why(two, "00_write")
    (two / "texts/.hidden").write_text("no text")
    assert not why(two, "00_write")
    (two / "texts/calm.txt").rename(two / "texts/quiet.txt")
    assert why(two, "00_write") == "because texts has changed"


def test_a_file_belongs_to_the_notebook_that_wrote_it_last(two):
    record = Record(two, "demo")
    for _ in range(2):
        make(two, record, "00_write", number="42")
        make(two, record, "01_read", number="84")
        assert not why(two, "00_write") and not why(two, "01_read")


@pytest.mark.slow
def test_stops_at_the_failing_cell_and_goes_on_from_there(two, capsys):
    write_notebook(two, "02_last", "run")
    assert results(run_notebooks(["0", "1"], root=two)) == ["ran", "ran"]
    good = two / "runs/demo/notebooks/01_read.ipynb"
    before = good.read_bytes()

    write_notebook(two, "01_read", READ, "1 + 1\nvalues = {}\nvalues['not there']")
    with pytest.raises(NotebookError) as caught:
        run_notebooks(root=two)
    message = str(caught.value)
    assert message.startswith("notebooks/01_read.ipynb failed in this cell:")
    assert "    1 + 1\n    values = {}\n    values['not there']\n" in message
    assert "KeyError: 'not there'" in message and "\x1b" not in message
    assert "runs/demo/notebooks/01_read.failed.ipynb" in message
    assert "goes on from 01_read" in message
    assert good.read_bytes() == before  # the good result of before stays
    table = capsys.readouterr().out
    assert "up to date" in table and "failed" in table and "not run" in table

    write_notebook(two, "01_read", READ)
    assert results(run_notebooks(root=two)) == ["up to date", "ran", "ran"]
    assert not (two / "runs/demo/notebooks/01_read.failed.ipynb").exists()
    assert results(run_notebooks("02", root=two, resume=False)) == ["ran"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("import sys\nsys.exit(0)", "sys.exit"),  # papermill alone calls this a success
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "ran out of memory"),
    ],
)
def test_a_notebook_that_ends_early_has_failed(tmp_path, cell, said):
    write_notebook(tmp_path, "00_early", cell, "print('never')")
    with pytest.raises(NotebookError, match=said) as caught:
        run_notebooks(root=tmp_path)
    assert cell.splitlines()[-1] in str(caught.value)


def test_a_missing_kernel_comes_with_its_command(tmp_path):
    path = write_notebook(tmp_path, "00_kernel", "1")
    path.write_text(path.read_text().replace('"name": "python3"', '"name": "no-such-kernel"'))
    with pytest.raises(NotebookError, match="python -m ipykernel install"):
        run_notebooks(root=tmp_path)


def test_where_it_is_called_and_the_shells_settings_do_not_matter(tmp_path, monkeypatch):
    """A root with braces, which papermill would format; a backend that hides figures."""
    root = tmp_path / "a {run} b"
    root.mkdir()
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir("/")
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
    where = "from pathlib import Path\nassert Path.cwd().name == 'notebooks'"
    write_notebook(root, "00_plot", plot, where)
    assert results(run_notebooks(root=root)) == ["ran"]
    assert "data:image/png" in (root / "runs/demo/notebooks/00_plot.html").read_text()


@pytest.mark.slow
def test_peak_memory_is_the_notebooks_own(tmp_path):
    write_notebook(tmp_path, "00_large", "block = b'x' * 400_000_000\ndel block")
    write_notebook(tmp_path, "01_small", "1")
    large, small = run_notebooks(root=tmp_path)
    assert large.peak_memory_mb > 400 > small.peak_memory_mb


def test_parameters_reach_the_notebooks_that_declare_them_in_their_types(tmp_path):
    defaults = (
        'run = "demo"\nflag = True\nrate = 0.1\nname = "a"\nlayers = [1]\nlimit = None\nseed = 0'
    )
    check = (
        "assert flag is False and rate == 1e-5 and name == '007' and layers == [2, 4]\n"
        "assert limit == 3 and type(seed) is int and seed == 5 and run == 'other'"
    )
    write_notebook(tmp_path, "00_check", check, parameters=defaults)
    write_notebook(tmp_path, "01_without", "1", parameters=None)
    given = {"flag": "false", "rate": "1e-5", "name": "007", "layers": (2, 4), "limit": "3"}
    run_notebooks(root=tmp_path, run="other", parameters=given | {"seed": np.int64(5)})


def test_every_wrong_parameter_is_refused_before_anything_runs(two):
    with pytest.raises(NotebookError) as caught:
        run_notebooks(root=two, parameters={"facto": 1, "factor": "0.5", "run": "x", "zzz": 1})
    message = str(caught.value)
    assert "`facto`; did you mean `factor`?" in message
    assert "`factor` of 00_write takes a whole number (its default is 2), not 0.5" in message
    assert "`factor` of 01_read takes a whole number" in message
    assert "`run`; say `--run NAME`" in message and "`zzz`; there are: factor" in message
    assert not (two / "runs").exists()


@pytest.mark.parametrize("run", ["", "../x", "a/b", "{x}", ".hidden", "a b"])
def test_a_run_name_that_is_no_folder_name_is_refused(two, run):
    with pytest.raises(AmygdalaError, match="cannot name a run"):
        run_notebooks(root=two, run=run)


@pytest.mark.parametrize("text", ["{", '{"notebooks": [{"unknown": 1}]}', "[]"])
def test_a_damaged_summary_is_named(two, text):
    summary = two / "runs/demo/notebooks/summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(text)
    with pytest.raises(NotebookError, match="Delete it"):
        run_notebooks(root=two)


@contextmanager
def sleeping_runner(root: Path):
    """A runner, in a process of its own, whose notebook has begun to sleep for ten minutes."""
    write_notebook(root, "00_sleep", "open('begun', 'w').close()", "import time; time.sleep(600)")
    command = (  # a shell's background job ignores Ctrl-C, and so would its children
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from amygdala_lib.notebooks import run_notebooks; run_notebooks(root={str(root)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (root / "notebooks/begun").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_two_runners_do_not_share_a_run_and_ctrl_c_leaves_nothing_behind(tmp_path):
    with sleeping_runner(tmp_path) as process:
        with pytest.raises(NotebookError, match="--run NAME"):
            run_notebooks(root=tmp_path)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    left = {path.name for path in (tmp_path / "runs/demo/notebooks").iterdir()}
    assert left == {".lock"}


# --- which notebooks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "start", "expected"),
    [
        (None, None, ["00_a", "01_b", "02_c", "10_d"]),
        ("1", None, ["01_b"]),
        ("02", None, ["02_c"]),
        (["10_d", "notebooks/00_a.ipynb"], None, ["00_a", "10_d"]),
        ("0[12]*", None, ["01_b", "02_c"]),
        (None, "02", ["02_c", "10_d"]),
        (["0*"], "01", ["01_b", "02_c"]),
    ],
)
def test_selection(tmp_path, selection, start, expected):
    for name in ("10_d", "02_c", "00_a", "01_b"):
        write_notebook(tmp_path, name, "1")
    found = find_notebooks(selection, start=start, root=tmp_path)
    assert [path.stem for path in found] == expected


def test_a_path_outside_the_repository(two, tmp_path_factory):
    path = write_notebook(tmp_path_factory.mktemp("else"), "my_own", "1")
    assert find_notebooks(path, root=two) == [path]


@pytest.mark.parametrize(
    ("selection", "start", "said"),
    [
        (["07", "00", "nine"], None, "No notebook matches 07, nine. There are: 00_write, 01_read"),
        (None, "05", "No notebook matches 05"),
        ("00", "01", "nothing to run at or after 01"),
        ("", None, "No notebook matches"),
    ],
)
def test_a_selection_that_finds_nothing(two, selection, start, said):
    with pytest.raises(NotebookError, match=said):
        find_notebooks(selection, start=start, root=two)


def test_no_notebooks_at_all(tmp_path):
    with pytest.raises(NotebookError, match="clone"):
        find_notebooks(root=tmp_path)


def test_a_file_that_is_no_notebook(two):
    (two / "notebooks/02_torn.ipynb").write_text('{"cells": [')
    with pytest.raises(NotebookError, match="02_torn.ipynb is not a notebook.*git checkout"):
        run_notebooks(root=two)


# --- parameters ----------------------------------------------------------------------------------


def test_declared_parameters_are_bare_literals(tmp_path):
    path = write_notebook(
        tmp_path, "00_p", parameters="a = -1  # one\nb: float | None = None\nc = [1, 'x']"
    )
    assert declared_parameters(path) == {"a": -1, "b": None, "c": [1, "x"]}
    for wrong in ("a = 1\nb = 2 * a", "import os", "a, b = 1, 2", "a = {1, 2}", "a = = 1"):
        path = write_notebook(tmp_path, "00_p", parameters=wrong)
        with pytest.raises(NotebookError, match="00_p.ipynb"):
            declared_parameters(path)


@given(st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_a_value_typed_on_the_command_line_is_the_value_in_python(value):
    for default in (None, type(value)()):
        read = cast_parameter(str(value), default)
        assert read == value and type(read) is type(value)
    assert cast_parameter(str(value), "text") == str(value)


@given(st.lists(st.integers(-(2**31), 2**31) | st.floats(-1e9, 1e9)))
def test_numpy_and_tuples_become_what_json_can_say(values):
    expected = json.loads(json.dumps(values))
    assert cast_parameter(tuple(values), []) == expected
    assert cast_parameter(np.array(values, dtype=float), []) == [float(v) for v in values]
    assert cast_parameter(json.dumps(values), [1]) == expected


@pytest.mark.parametrize(
    ("value", "default"),
    [
        ("yes", True), (1, True), ("1.5", 3), ("true", 3), ("x", 0.5), (4, "text"), ("2,4", [1]),
        ("none", 3), (float("nan"), 0.5), ("1e999", 0.5), ({1, 2}, None), (b"x", "text"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(value, default):
    with pytest.raises(ValueError, match="takes|cannot be"):
        cast_parameter(value, default)


# --- the bar of links ----------------------------------------------------------------------------


def test_navigation_is_made_from_the_file_names_and_settles_at_once(tmp_path):
    for name in ("00_a", "01_second_one", "02_c"):
        write_notebook(tmp_path, name, "1")
    assert len(write_navigation(tmp_path)) == 3
    assert write_navigation(tmp_path) == []
    source = nbformat.read(tmp_path / "notebooks/01_second_one.ipynb", as_version=4).cells[0].source
    assert source == (
        "# 01_second_one\n\n<!-- nav -->\n[← 00 a](00_a.ipynb) · [02 c →](02_c.ipynb)\n"
        "<!-- /nav -->\n\nOne question."
    )
    (tmp_path / "notebooks/00_a.ipynb").unlink()
    assert [path.stem for path in write_navigation(tmp_path)] == ["01_second_one"]
    assert "00 a" not in (tmp_path / "notebooks/01_second_one.ipynb").read_text()


def test_navigation_needs_a_title_and_otherwise_writes_nothing(tmp_path):
    kept = write_notebook(tmp_path, "00_a", "1").read_bytes()
    path = write_notebook(tmp_path, "01_b", "1")
    path.write_text(path.read_text().replace("# 01_b", "No title"))
    with pytest.raises(NotebookError, match="01_b.ipynb"):
        write_navigation(tmp_path)
    assert (tmp_path / "notebooks/00_a.ipynb").read_bytes() == kept
