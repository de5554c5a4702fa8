"""The notebooks as they are committed: which there are, their parameters, their bars of links."""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from amygdala_lib.errors import NotebookError

ROOT = Path(__file__).resolve().parents[1]  # never the working directory: Jupyter moves it

Selection = str | os.PathLike | Iterable[str | os.PathLike] | None


def find_notebooks(
    selection: Selection = None, *, start: str | None = None, root: str | os.PathLike = ROOT
) -> list[Path]:
    """Paths of the selected notebooks, in the order of their names.

    `selection`: names or how they begin, numbers (`2`, `02`), glob patterns, paths; all of
    `<root>/notebooks` when None or empty. `start`: leave out what stands before this one.

    Raises NotebookError naming every selection that matches nothing, with what there is.
    """
    folder = Path(root).resolve() / "notebooks"
    everything = sorted(folder.glob("[!.]*.ipynb"), key=lambda path: path.name)
    selection = [selection] if isinstance(selection, (str, os.PathLike)) else list(selection or [])
    if not everything and not selection:
        raise NotebookError(
            f"There are no notebooks in {folder}. They come with the repository, not with the "
            "package: clone it, and there `python -m pip install --no-deps -e .`"
        )

    def matching(wanted: str | os.PathLike) -> list[Path]:
        path = Path(wanted)
        if path.suffix == ".ipynb" and path.is_file():
            return [path.resolve()]
        name = path.name.removesuffix(".ipynb")
        exact = [path for path in everything if path.stem == name]
        pattern = f"{int(name):02d}_*.ipynb" if name.isdecimal() else f"{name}*.ipynb"
        return exact or [path for path in everything if name and path.match(pattern)]

    chosen = {str(wanted): matching(wanted) for wanted in selection}
    first = {} if start is None else {start: matching(start)}
    if missing := [wanted for wanted, found in (chosen | first).items() if not found]:
        names = ", ".join(path.stem for path in everything) or f"none in {folder}"
        raise NotebookError(f"No notebook matches {', '.join(missing)}. There are: {names}.")
    found = sorted({p for paths in chosen.values() for p in paths}, key=lambda path: path.name)
    found = found or everything
    if start is not None:
        found = [path for path in found if path.name >= first[start][0].name]
        if not found:
            raise NotebookError(f"There is nothing to run at or after {start}.")
    stems = [path.stem for path in found]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise NotebookError(f"Two notebooks are named {', '.join(twice)}; run them one by one.")
    return found


def read_notebook(path: str | os.PathLike) -> Any:
    """The notebook as an nbformat node. Raises NotebookError if the file is not a notebook."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat lets JSON, Unicode, OS and validation errors through
        raise NotebookError(
            f"{path} is not a notebook ({error}). Restore it: `git checkout -- {path}`"
        ) from error


def tags(cell: Any) -> list[str]:
    """Tags of a cell."""
    return cell.metadata.get("tags", [])


def declared_parameters(path: str | os.PathLike) -> dict[str, Any]:
    """Names and defaults in the cell tagged `parameters`; empty if there is none.

    Raises NotebookError if there is more than one such cell, or if it holds more than
    `name = literal`: papermill sets values after the cell, so what is computed in it would keep
    the defaults.
    """
    cells = [cell for cell in read_notebook(path).cells if "parameters" in tags(cell)]
    if len(cells) > 1:
        raise NotebookError(f"{path} has {len(cells)} cells tagged `parameters`; keep one.")
    source = cells[0].source if cells else ""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise NotebookError(f"{path}: the parameters cell is not Python: {error}") from error
    declared, wrong = {}, []
    for statement in statements:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                try:
                    declared[name] = _plain(ast.literal_eval(value))
                    continue
                except (ValueError, TypeError):
                    pass
        wrong.append(ast.get_source_segment(source, statement))
    if wrong:
        raise NotebookError(
            f"{path}: the parameters cell may hold only `name = literal`. Move to the next cell: "
            + "; ".join(wrong)
        )
    return declared


def settings(
    paths: Sequence[Path], run: str, parameters: Mapping[str, Any]
) -> dict[Path, dict[str, Any]]:
    """Per notebook the parameters to set: `run`, and those of `parameters` that it declares.

    Raises NotebookError listing every parameter that no notebook declares or that has another
    type than its default.
    """
    declared = {path: declared_parameters(path) for path in paths}
    known = sorted({name for names in declared.values() for name in names} - {"run"})
    problems = []
    for name in parameters.keys() - set(known):
        close = difflib.get_close_matches(name, known, n=1)
        if name == "run":
            hint = "say `--run NAME`"
        else:
            hint = f"did you mean `{close[0]}`?" if close else f"there are: {', '.join(known)}"
        problems.append(f"no notebook here takes a parameter `{name}`; {hint}")
    chosen = {}
    for path, defaults in declared.items():
        chosen[path] = {"run": run} if "run" in defaults else {}
        for name in defaults.keys() & parameters.keys() - {"run"}:
            try:
                chosen[path][name] = cast_parameter(parameters[name], defaults[name])
            except ValueError as error:
                problems.append(f"`{name}` of {path.stem} {error}")
    if problems:
        raise NotebookError("Nothing was run:\n  " + "\n  ".join(sorted(problems)))
    return chosen


def cast_parameter(value: Any, default: Any) -> Any:
    """`value` as the type of `default`, in types that survive JSON and papermill.

    A string is text where the default is text. Elsewhere it is read: `true`, `false`, `none`,
    whole numbers, numbers (`1e-5` too), `[1, 2]`. A default of None takes anything. numpy and
    torch scalars and arrays, tuples and paths become numbers, lists and strings.

    Raises ValueError if the types do not agree.
    """
    value = _plain(value)
    if isinstance(value, str) and not isinstance(default, str):
        value = _read_word(value)
    if type(default) is float and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        kind = kinds.get(type(default), "a list such as [1, 2]")
        raise ValueError(f"takes {kind} (its default is {default!r}), not {value!r}")
    return value


_WORDS = {"true": True, "false": False, "none": None}
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _read_word(word: str) -> Any:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if _WHOLE.fullmatch(word):
        return int(word)
    if _NUMBER.fullmatch(word):
        return _plain(float(word))
    if word.startswith("["):
        with contextlib.suppress(json.JSONDecodeError):
            return _plain(json.loads(word))
    return word


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"cannot be {value!r}: use text, finite numbers, true, false, none or a list")


_BAR = re.compile(r"<!-- nav -->.*?<!-- /nav -->", re.DOTALL)


def write_navigation(root: str | os.PathLike = ROOT) -> list[Path]:
    """Bring the previous/next bar under each notebook's title up to date; returns what changed.

    The bar stands between `<!-- nav -->` and `<!-- /nav -->` in the first cell and is made from
    the file names, so a second call changes nothing. Raises NotebookError, before it writes, if
    a notebook does not begin with a markdown cell whose first line is its title, `# ...`.
    """
    import nbformat

    paths = find_notebooks(root=root)
    notebooks = {path: read_notebook(path) for path in paths}
    untitled = [
        path.name
        for path, notebook in notebooks.items()
        if not notebook.cells
        or notebook.cells[0].cell_type != "markdown"
        or not notebook.cells[0].source.startswith("# ")
    ]
    if untitled:
        raise NotebookError(f"The first cell must begin with `# Title` in: {', '.join(untitled)}.")
    changed = []
    for path, notebook in notebooks.items():
        first = notebook.cells[0]
        title, _, rest = _BAR.sub("", first.source).partition("\n")
        bar = navigation_bar(path, paths)
        source = "\n\n".join(filter(None, [title.strip(), bar, rest.strip()]))
        if source != first.source:
            first.source = source
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
            os.replace(temporary, path)
            changed.append(path)
    return changed


def navigation_bar(path: Path, paths: Sequence[Path]) -> str:
    """Links to the notebooks before and after `path` in `paths`, between the bar's markers."""
    at = paths.index(path)
    links = [f"[← {_label(before)}]({before.name})" for before in paths[:at][-1:]]
    links += [f"[{_label(after)} →]({after.name})" for after in paths[at + 1 :][:1]]
    return f"<!-- nav -->\n{' · '.join(links)}\n<!-- /nav -->"


def _label(path: Path) -> str:
    return path.stem.replace("_", " ")
