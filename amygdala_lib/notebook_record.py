"""What became of each notebook of a run, and whether it would do again what it has done.

Content decides, never a date: the notebook's cells, its parameters and the files they name, the
library, and the files that earlier notebooks made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from amygdala_lib.errors import NotebookError
from amygdala_lib.notebook_sources import declared_parameters, read_notebook, tags

PACKAGE = Path(__file__).resolve().parent


@dataclass
class Outcome:
    """What became of one notebook, as `summary.json` keeps it.

    `result` is one of `ran`, `up to date`, `failed`, `not run`; `peak_memory_mb` is that of the
    largest process the notebook used; `reads` and `made` map files, relative to the root, to
    sha256.
    """

    notebook: str
    result: str = "not run"
    seconds: float | None = None
    peak_memory_mb: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    library: str = ""
    reads: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    error: str | None = None


class Record:
    """What a run has done so far, kept in `runs/<run>/notebooks/summary.json`.

    Raises NotebookError if that file is damaged.
    """

    def __init__(self, root: Path, run: str):
        self.root, self.run = root, run
        self.folder = root / "runs" / run / "notebooks"
        self.path = self.folder / "summary.json"
        self.outcomes: dict[str, Outcome] = {}
        self._hashes: dict[Path, str] = {}  # a parameter may name a model of 54 GB: read it once
        if self.path.exists():
            self._read()

    def plan(self, path: Path, given: Mapping[str, Any]) -> Outcome:
        """The notebook's outcome to be: nothing yet but all that its results depend on."""
        cells = [[cell.cell_type, cell.source, tags(cell)] for cell in read_notebook(path).cells]
        parameters = declared_parameters(path) | given
        reads = {
            file: digest
            for name, earlier in sorted(self.outcomes.items())
            if name < path.stem
            for file in earlier.made
            if (digest := hash_content(self.root / file))
        }
        for value in parameters.values():
            if isinstance(value, str) and (digest := self._hash_named(value)):
                reads[value] = digest
        return Outcome(
            path.stem,
            parameters=parameters,
            source=hashlib.sha256(json.dumps(cells).encode()).hexdigest(),
            library=self._hash_once(PACKAGE),
            reads=reads,
        )

    def why_run(self, outcome: Outcome) -> str:
        """Why the planned notebook has to run, in words; empty if it is up to date."""
        before = self.outcomes.get(outcome.notebook)
        if before is None:
            return "for the first time"
        if before.error:
            return "because it failed the last time"
        if before.source != outcome.source:
            return "because it has changed"
        if before.parameters != outcome.parameters:
            return "because its parameters have changed"
        if before.library != outcome.library:
            return "because amygdala_lib has changed"
        for file in sorted(before.reads.keys() | outcome.reads.keys()):
            if before.reads.get(file) != outcome.reads.get(file):
                return f"because {file} has changed"
        for file, digest in before.made.items():
            if hash_content(self.root / file) != digest:
                return f"because {file}, which it made, has changed"
        for suffix in (".ipynb", ".html"):
            if not (self.folder / f"{outcome.notebook}{suffix}").is_file():
                return f"because {outcome.notebook}{suffix} is not there"
        return ""

    def files(self) -> dict[str, tuple[int, int, int]]:
        """Files that notebooks made in this run, each with what shows that it is written again."""
        files = {}
        for file in self.folder.parent.rglob("*"):
            name = file.relative_to(self.folder.parent).as_posix()
            if file.is_file() and not re.match(r"notebooks/|(.*/)?\.", name):
                stat = file.stat()
                key = file.relative_to(self.root).as_posix()
                files[key] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        return files

    def keep(self, outcome: Outcome, before: Mapping[str, tuple[int, int, int]]) -> None:
        """Add what the notebook made since `before = files()`, and save.

        Its own are the files written now, and those it made earlier and found still good (a
        cache). What another notebook had made and this one wrote over is no longer the other's,
        or each would make the other stale for ever.
        """
        written = {file for file, stamp in self.files().items() if stamp != before.get(file)}
        earlier = self.outcomes.get(outcome.notebook, outcome).made
        for other in self.outcomes.values():
            other.made = {file: sha for file, sha in other.made.items() if file not in written}
        outcome.made = {
            file: digest
            for file in sorted(written | earlier.keys())
            if (digest := hash_content(self.root / file))
        }
        # A file of an earlier notebook that this one wrote over is no longer something it reads.
        outcome.reads = {file: sha for file, sha in outcome.reads.items() if file not in written}
        self.outcomes[outcome.notebook] = outcome
        self._write()

    def _hash_named(self, value: str) -> str:
        """Hash of the file or folder that a parameter names; empty if it names none."""
        path = self.root / value
        if not value.strip("./") or path.is_relative_to(self.root / "runs"):
            return ""  # what notebooks make is looked at file by file
        return self._hash_once(path)

    def _hash_once(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = hash_content(path)
        return self._hashes[path]

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            entries = [Outcome(**entry) for entry in content["notebooks"]]
        except (ValueError, KeyError, TypeError) as error:
            raise NotebookError(
                f"{self.path} cannot be read ({error}). Delete it; then every notebook runs again."
            ) from error
        self.outcomes = {entry.notebook: entry for entry in entries}

    def _write(self) -> None:
        from amygdala_lib.artefacts import provenance, write_json  # imports torch

        entries = [asdict(outcome) for _, outcome in sorted(self.outcomes.items())]
        write_json(self.path, provenance(run=self.run, notebooks=entries))


def hash_content(path: Path) -> str:
    """sha256 of a file, or of the names and contents in a folder; empty if there is neither."""
    try:
        if path.is_dir():
            files = {file.relative_to(path).as_posix(): file for file in path.rglob("*")}
            digests = {
                name: hash_content(file)
                for name, file in sorted(files.items())
                if file.is_file() and not re.search(r"(^|/)(\.|__pycache__/)", name)
            }
            return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except (OSError, ValueError):  # not there, or a parameter's text that cannot be a path
        return ""


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per notebook: result, time and peak memory."""
    width = max(len(outcome.notebook) for outcome in outcomes)
    lines = ["", f"{'notebook':{width}}  {'result':10}  {'time':>8}  {'peak memory':>11}"]
    for outcome in outcomes:
        seconds, memory = outcome.seconds, outcome.peak_memory_mb
        spent = "" if seconds is None else f"{int(seconds // 60)}:{seconds % 60:04.1f}"
        peak = "" if memory is None else f"{memory:,} MB"
        lines.append(f"{outcome.notebook:{width}}  {outcome.result:10}  {spent:>8}  {peak:>11}")
    return "\n".join(lines)
