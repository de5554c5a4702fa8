"""Files that steps hand to one another: safetensors beside JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ArtefactError

FORMAT_VERSION = 1
LIBRARIES = ("amygdala_lib", "torch", "transformers", "numpy")


def repository_root() -> Path:
    """The checkout this package runs from; the working directory if it is installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").exists() else Path.cwd()


def check_run(run: str) -> str:
    """The name of a run as it is; raises ArtefactError for one that would lead out of runs/."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", run):
        raise ArtefactError(f"{run!r} cannot name a run. Use letters, digits, `-`, `_` and `.`.")
    return run


def run_folder(run: str) -> Path:
    """`runs/<run>` in the repository, made if need be: what the notebooks of one run hand on."""
    folder = repository_root() / "runs" / check_run(run)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary file beside `path`, then put it in its place: fsync, rename, fsync.

    Yields the temporary path. If the block raises, `path` is left as it was, and nothing is left
    behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def as_json(content: Mapping[str, Any]) -> str:
    """A JSON object, readable by people and in the order it was given.

    Raises ArtefactError for a value that JSON has no form for.
    """
    try:
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise ArtefactError(f"{error}: pass text, numbers, lists or objects of these") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `as_json(content)`."""
    text = as_json(content)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """Read a JSON object. Raises ArtefactError naming `made_by`, the step that writes this file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{path} is not there: {made_by} writes it, run that first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(
            f"{path} is damaged ({error}): delete it and run {made_by} again"
        ) from error
    if not isinstance(content, dict):
        raise ArtefactError(
            f"{path} holds a {type(content).__name__}, not an object: run {made_by} again"
        )
    return content


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, each contiguous, from the CPU, in its own dtype."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata=dict(metadata or {}))


def read_tensors(path: Path, made_by: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata.

    Raises ArtefactError naming `made_by`, the step that writes it, if it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise ArtefactError(f"{path} is not there: {made_by} writes it, run that first") from None
    except (SafetensorError, OSError) as error:
        raise ArtefactError(
            f"{path} is damaged ({error}): delete it and run {made_by} again"
        ) from error


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed as a package"
    found["torch"] = torch.__version__  # only here with its build, such as "+cpu"
    return found


def provenance(**facts: Any) -> dict[str, Any]:
    """What every artefact's JSON says about its origin: format, library versions, and `facts`."""
    return {"format_version": FORMAT_VERSION, "versions": versions(), **facts}
