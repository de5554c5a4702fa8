"""One notebook, run by papermill in a process of its own; `notebooks.py` starts it as a script.

It imports nothing of amygdala_lib: torch here would cost every notebook seconds and memory.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.pop(0)  # the script's folder, whose `models` and `errors` must not hide anyone else's

import papermill  # noqa: E402
from nbconvert import HTMLExporter  # noqa: E402
from papermill.exceptions import PapermillExecutionError  # noqa: E402


def execute(job: Mapping[str, Any]) -> None:
    """Run a notebook; report an empty JSON object per cell on stdout, and at the end what came."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the kernel inherits stdout, and native code may print there
    # Ctrl-C reaches the whole process group. The parent alone decides, by SIGTERM, so that the
    # kernel is shut down once and properly.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    source, working = Path(job["notebook"]), Path(job["output"])
    current = None

    def started(cell: Any, cell_index: int) -> None:
        nonlocal current
        current = cell

    report: dict[str, Any] = {}
    try:
        # papermill calls str.format on paths.
        notebook, output = (str(p).replace("{", "{{").replace("}", "}}") for p in (source, working))
        executed = papermill.execute_notebook(
            notebook,
            output,
            parameters=job["parameters"],
            language="python",  # else papermill needs it in the metadata
            cwd=str(source.parent),  # as in JupyterLab
            progress_bar=False,
            start_timeout=300,
            on_cell_execute=started,
            on_cell_executed=lambda **_: print("{}", file=events),
        )
        # papermill takes sys.exit(0) for success.
        outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
        if any(output.output_type == "error" for output in outputs):
            raise RuntimeError("sys.exit stopped the notebook before its end; raise an error or if")
        current = None
        page = {"metadata": {"name": source.stem}}
        body, _ = HTMLExporter().from_notebook_node(executed, resources=page)
        body = re.sub(r'href="([\w-]+)\.ipynb"', r'href="\1.html"', body)  # the bar, page to page
        working.with_suffix(".html").write_text(body, encoding="utf-8")
    except Exception as error:
        report["error"] = describe(error, current)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    report["peak_memory_mb"] = round(peak / 2**20)
    print(json.dumps(report), file=events)


def describe(error: Exception, cell: Any) -> str:
    """The failing cell's source and its error, without colour codes."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, PapermillExecutionError):
        trace = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", "\n".join(error.traceback)).splitlines()
        what = "\n".join(trace[-40:]) or f"{error.ename}: {error.evalue}"
    elif "Kernel died" in what:
        what += ". Most often the machine ran out of memory: see TROUBLESHOOTING.md"
    elif "No such kernel" in what:
        what += ". Install it: `python -m ipykernel install --sys-prefix --name python3`"
    if cell is None:
        return f": {what}"
    source = "\n".join(f"    {line}" for line in cell.source.strip().splitlines())
    return f" in this cell:\n\n{source}\n\n{what}"


if __name__ == "__main__":
    execute(json.loads(sys.argv[1]))
