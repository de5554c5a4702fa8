"""Run the notebooks in order, headlessly, and keep what came of each.

Every notebook runs in a process of its own. Under `runs/<run>/notebooks/` it leaves the executed
notebook, an HTML copy and its part of `summary.json`. A notebook that would do again what it has
done is left out: what decides is content (its cells, its parameters and the files they name, the
library, the files earlier notebooks made), never a date. Weights that a model id stands for and
installed packages are not looked at: `amygdala run --fresh` runs everything.

    python -m amygdala_lib.notebooks nav      write the previous/next bars of notebooks/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from amygdala_lib.artefacts import check_run
from amygdala_lib.errors import NotebookError
from amygdala_lib.notebook_record import PACKAGE, Outcome, Record, table
from amygdala_lib.notebook_sources import (
    ROOT,
    Selection,
    find_notebooks,
    read_notebook,
    settings,
    write_navigation,
)


def run_notebooks(
    notebooks: Selection = None,
    *,
    run: str = "demo",
    parameters: Mapping[str, Any] | None = None,
    start: str | None = None,
    resume: bool = True,
    root: str | os.PathLike = ROOT,
) -> list[Outcome]:
    """Run notebooks in the order of their names; stop at the first that fails.

    `notebooks`: names, numbers (`02`), glob patterns or paths; all of `<root>/notebooks` when
    None. `start`: leave out what stands before this one. `run`: the folder under `runs/` for
    everything made; notebooks get it as their parameter `run`. `parameters`: each goes to the
    notebooks that declare it, as the type of its default there (the words `1e-5` and `false`
    are read as that type). `resume=False` runs also what is up to date.

    Raises AmygdalaError before anything runs: for a name that no run can have, a notebook that
    cannot be found or read, and a parameter that no notebook declares or that has another type.
    Raises NotebookError at the first failing cell, with the cell's source; the next call begins
    with that notebook.
    """
    check_run(run)
    root = Path(root).resolve()
    paths = find_notebooks(notebooks, start=start, root=root)
    given = settings(paths, run, parameters or {})
    cells = {path: sum(c.cell_type == "code" for c in read_notebook(path).cells) for path in paths}

    from tqdm.auto import tqdm

    folder = root / "runs" / run / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [Outcome(path.stem) for path in paths]
    interval = 0.1 if sys.stderr.isatty() else 10
    with (
        _alone(folder, run),
        tqdm(total=sum(cells.values()), unit="cell", mininterval=interval) as bar,
    ):
        record = Record(root, run)
        for number, path in enumerate(paths):
            outcome = record.plan(path, given[path])
            reason = record.why_run(outcome) if resume else "as asked"
            bar.set_description(path.stem)
            if not reason:
                outcomes[number] = replace(record.outcomes[path.stem], result="up to date")
                bar.total -= cells[path]
                bar.write(f"{path.stem}: up to date, nothing that it depends on has changed")
                continue
            bar.write(f"{path.stem}: running, {reason}")
            outcomes[number] = outcome
            done = bar.n + cells[path]
            before = record.files()
            _run_one(outcome, path, given[path], record, tick=bar.update)
            record.keep(outcome, before)
            bar.update(done - bar.n)  # papermill adds a cell, and empty ones do not count
            if outcome.error:
                break
    print(f"\n{table(outcomes)}\nExecuted notebooks and their pages: {folder.relative_to(root)}/")
    for outcome in outcomes:
        if outcome.error:
            raise NotebookError(outcome.error)
    return outcomes


def _run_one(
    outcome: Outcome,
    path: Path,
    given: dict[str, Any],
    record: Record,
    tick: Callable[[], object],
) -> None:
    """Run one notebook in a child process; only a whole result takes the old one's place."""
    root, folder = record.root, record.folder
    working = folder / f".{path.stem}.running.ipynb"
    failed = folder / f"{path.stem}.failed.ipynb"
    began = time.monotonic()
    try:
        report = _run_child(path, working, given, tick)
        outcome.seconds = round(time.monotonic() - began, 2)
        outcome.peak_memory_mb = report.get("peak_memory_mb")
        if "error" in report:
            outcome.result = "failed"
            where = path.relative_to(root) if path.is_relative_to(root) else path
            outcome.error = f"{where} failed{report['error']}\n"
            if working.is_file():
                os.replace(working, failed)
                outcome.error += f"\nExecuted up to there: {failed.relative_to(root)}"
            outcome.error += f"\nOnce mended, the same command goes on from {path.stem}."
        else:
            outcome.result = "ran"
            for suffix in (".html", ".ipynb"):
                os.replace(working.with_suffix(suffix), folder / f"{path.stem}{suffix}")
            failed.unlink(missing_ok=True)
    finally:
        for suffix in (".html", ".ipynb"):
            working.with_suffix(suffix).unlink(missing_ok=True)


def _run_child(
    path: Path, working: Path, given: dict[str, Any], tick: Callable[[], object]
) -> dict[str, Any]:
    """Execute the notebook in a child; its report: `peak_memory_mb`, and `error` if it failed."""
    environment = {"TQDM_MININTERVAL": "10", **os.environ}  # else saved bars fill the page
    environment.pop("MPLBACKEND", None)  # a backend set for the shell would hide inline figures
    environment.pop("JPY_SESSION_NAME", None)  # of the notebook this may have been called from
    # The notebook must use the library that runs it, installed or not.
    search = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search))
    job = {"notebook": str(path), "output": str(working), "parameters": given}
    report: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = subprocess.Popen(
            [sys.executable, str(PACKAGE / "notebook_child.py"), json.dumps(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
        try:
            with child.stdout:
                for line in child.stdout:
                    report = json.loads(line)
                    tick()
            child.wait()
        finally:
            if child.poll() is None:  # interrupted: let it stop its kernel
                child.terminate()
                try:
                    child.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        if not report:
            log.seek(0)
            tail = "".join(log.readlines()[-15:]).strip()
            report = {"error": f": its process ended with status {child.returncode}.\n{tail}"}
    return report


@contextlib.contextmanager
def _alone(folder: Path, run: str) -> Iterator[None]:
    """Hold the run: two runners in one folder would take each other's files for their own."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise NotebookError(
                f"Another `amygdala run` is at work in runs/{run}. Wait for it, or give this one "
                "a name of its own: `--run NAME`."
            ) from error
        yield


if __name__ == "__main__":
    if sys.argv[1:] != ["nav"]:
        sys.exit("usage: python -m amygdala_lib.notebooks nav")
    for path in write_navigation():
        print(f"wrote the bar of {path.name}")
