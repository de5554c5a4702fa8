"""`amygdala diff`, `sync`, `history`, `rollback` and `verify`: the model folder as checkpoint."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Any

from amygdala_lib.errors import AmygdalaError

if TYPE_CHECKING:  # importing torch for `amygdala --help` would take seconds
    import pandas as pd

    from amygdala_lib.checkpoint import Change, Difference

_HASH = 12  # digits shown; `rollback` takes as many


def add_commands(commands: argparse._SubParsersAction) -> None:
    diff = commands.add_parser(
        "diff",
        help="which bytes of two models differ",
        description="Compare a model folder with another, or with a safetensors file, tensor by "
        "tensor. Exit status 1 if they differ.",
        epilog="example: amygdala diff path/to/model path/to/tuned",
    )
    _add_folder(diff)
    _add_other(diff, "what to compare with")
    diff.set_defaults(function=_diff)

    sync = commands.add_parser(
        "sync",
        help="write into a model what has changed, and nothing else",
        description="Bring FOLDER to what OTHER holds, in place: only the blocks of 4 KB that "
        "change are written. A kill at any moment leaves the old state or the new one.",
        epilog="example: amygdala sync path/to/model path/to/tuned --fact job night-12",
    )
    _add_folder(sync)
    _add_other(sync, "what FOLDER is to hold")
    _add_changing(sync)
    sync.add_argument(
        "--allow-nonfinite", action="store_true", help="write infinities and NaN, too"
    )
    sync.add_argument("--keep", type=int, default=10, metavar="N", help="changes to keep (10)")
    sync.add_argument("--keep-bytes", type=int, metavar="N", help="and at most so many bytes")
    sync.set_defaults(function=_sync)

    history = commands.add_parser(
        "history",
        help="the states a model has been in",
        description="List the states that `amygdala rollback` can bring back, oldest first.",
        epilog="example: amygdala history path/to/model",
    )
    _add_folder(history)
    history.set_defaults(function=_history)

    rollback = commands.add_parser(
        "rollback",
        help="bring back an earlier state",
        description="Bring back a state of `amygdala history`, byte for byte. That is a change "
        "like any other: it can be rolled back.",
        epilog="example: amygdala rollback path/to/model --to 3",
    )
    _add_folder(rollback)
    rollback.add_argument(
        "--to", required=True, metavar="STATE", help="an id, or the first digits of a hash"
    )
    _add_changing(rollback)
    rollback.set_defaults(function=_rollback)

    verify = commands.add_parser(
        "verify",
        help="is every byte what it was?",
        description="Read all of a model and compare it with the hashes of the last sync or "
        "verify; the first one records them. Exit status 1 if anything differs.",
        epilog="example: amygdala verify path/to/model",
    )
    _add_folder(verify)
    verify.set_defaults(function=_verify)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a model folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--wait", type=float, default=0, metavar="SECONDS", help="for others to finish (0)"
    )


def _add_other(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("other", metavar="OTHER", help=f"{what}: a folder or safetensors file")
    parser.add_argument(
        "--partial", action="store_true", help="let OTHER lack tensors, which stay as they are"
    )


def _add_changing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--unshare",
        action="store_true",
        help="give FOLDER copies of files it shares with others (Hugging Face cache, hard links)",
    )
    parser.add_argument(
        "--fact",
        dest="facts",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="to be recorded in the history; may be repeated",
    )


def _diff(arguments: argparse.Namespace) -> int:
    from amygdala_lib.checkpoint import diff

    found = diff(arguments.folder, arguments.other, partial=arguments.partial, wait=arguments.wait)
    _print(arguments, _difference(found), str(found))
    return 1 if found else 0


def _sync(arguments: argparse.Namespace) -> int:
    from amygdala_lib.checkpoint import sync

    change = sync(
        arguments.folder,
        arguments.other,
        partial=arguments.partial,
        unshare=arguments.unshare,
        allow_nonfinite=arguments.allow_nonfinite,
        keep=arguments.keep,
        keep_bytes=arguments.keep_bytes,
        wait=arguments.wait,
        **_facts(arguments, sync),
    )
    _print(arguments, _change(change), str(change))
    return 0


def _history(arguments: argparse.Namespace) -> int:
    from amygdala_lib.checkpoint import history

    frame = history(arguments.folder, wait=arguments.wait)
    text = _states(frame) if len(frame) else f"{arguments.folder} has no history yet"
    _print(arguments, _records(frame), text)
    return 0


def _states(frame: pd.DataFrame) -> str:
    shown = frame.assign(
        parent=frame["parent"].str[:_HASH],
        hash=frame["hash"].str[:_HASH],
        facts=[
            " ".join(f"{name}={value}" for name, value in facts.items())
            if isinstance(facts, dict)
            else ""
            for facts in frame["facts"]
        ],
    )
    return shown.to_string(na_rep="")


def _rollback(arguments: argparse.Namespace) -> int:
    from amygdala_lib.checkpoint import rollback

    to = int(arguments.to) if len(arguments.to) < 7 and arguments.to.isdigit() else arguments.to
    change = rollback(
        arguments.folder,
        to,
        unshare=arguments.unshare,
        wait=arguments.wait,
        **_facts(arguments, rollback),
    )
    _print(arguments, _change(change), str(change))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from amygdala_lib.checkpoint import verify

    found = verify(arguments.folder, wait=arguments.wait)
    _print(arguments, {**vars(found), "path": str(found.path), "ok": found.ok}, str(found))
    return 0 if found.ok else 1


def _facts(arguments: argparse.Namespace, function: Callable) -> dict[str, str]:
    names = [name for name, _ in arguments.facts]
    if taken := sorted(set(names) & signature(function).parameters.keys()):
        raise AmygdalaError(f"{', '.join(taken)} cannot name a fact: choose another name")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise AmygdalaError(f"--fact is given twice for {', '.join(twice)}. Keep one value each.")
    return dict(arguments.facts)


def _change(change: Change) -> dict[str, Any]:
    told = ("id", "action", "parent", "hash", "shard_bytes", "delta_bytes", "copied", "seconds")
    return {name: getattr(change, name) for name in told} | {
        "total": _total(change.difference),
        "tensors": _records(change.to_frame()),
    }


def _difference(found: Difference) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "differs": bool(found),
        "total": _total(found),
        "tensors": _records(found.to_frame()),
    }


def _total(found: Difference) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in found.total().items()}


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A row each; what is infinite or not a number becomes null."""
    return json.loads(frame.reset_index().to_json(orient="records"))


def _print(arguments: argparse.Namespace, content: Any, text: str) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False) if arguments.json else text)
