"""Private: files and folders that only the user who runs the server can read or write."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LiveError


def private_folder(path: Path | str) -> Path:
    """A folder that only this user can enter, made with mode 0700 if it is not there.

    Raises LiveError if what is there is a link, belongs to another user, or is open to others.
    """
    folder = Path(path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(mode=0o700, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise LiveError(f"{folder}, or what it is to be in, is a file: give another path") from None
    except OSError as error:
        raise LiveError(f"{folder} cannot be made: {error.strerror}") from error
    check_private(folder)
    return folder


def check_private(path: Path | str) -> None:
    """Raises LiveError unless `path` is this user's alone: owner, mode, and no link; all at once.

    Who owns a file that others can replace decides what is written into the server's memory.
    """
    try:
        found = os.lstat(path)
    except OSError as error:
        raise LiveError(f"{path} cannot be looked at: {error.strerror}") from error
    _check(path, found)


def read_private(path: Path | str, limit: int) -> bytes:
    """The content of a private file of at most `limit` bytes; it and its folder are checked.

    Raises LiveError if it is missing, longer, no regular file, or not this user's alone.
    """
    descriptor = open_private(path)
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise LiveError(f"{path} is longer than {limit:,} bytes: it is not what it should be")
    return content


def open_private(path: Path | str) -> int:
    """A descriptor, for reading, of a private file; what is checked is what was opened.

    Raises LiveError as `read_private` does.
    """
    path = Path(path)
    check_private(path.parent)
    try:
        # O_NONBLOCK, or a named pipe would be waited on.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise LiveError(f"{path} is not there: is the server running, with this folder?") from None
    except OSError as error:
        _check(path, os.lstat(path))
        raise LiveError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        found = os.fstat(descriptor)
        _check(path, found)
        if not stat.S_ISREG(found.st_mode):
            raise LiveError(f"{path} is no regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_private(path: Path | str, content: bytes) -> None:
    """Write a file with mode 0600 into a private folder, whole or not at all.

    At no instant does it have another mode, so that whoever checks it never refuses it by chance.
    Raises LiveError if the folder is not private, or writing fails.
    """
    path = Path(path)
    check_private(path.parent)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise LiveError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_private_json(path: Path | str, content: Mapping[str, Any]) -> None:
    """Write a JSON object as `write_private` does."""
    write_private(path, (json.dumps(content, indent=1) + "\n").encode())


def read_private_json(path: Path | str, limit: int) -> dict[str, Any]:
    """A JSON object from a private file of at most `limit` bytes.

    Raises LiveError as `read_private` does, and if it is damaged.
    """
    content = read_private(path, limit)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LiveError(
            f"{path} is damaged ({error}): stop the server, delete it, start again"
        ) from error
    if not isinstance(found, dict):
        raise LiveError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def _check(path: Path | str, found: os.stat_result) -> None:
    problems = []
    if stat.S_ISLNK(found.st_mode):
        problems.append("is a symbolic link: give the path it leads to")
    else:
        if found.st_uid != os.geteuid():
            problems.append(f"belongs to user {found.st_uid}, not {os.geteuid()}: run as its owner")
        if stat.S_IMODE(found.st_mode) & 0o077:
            wanted = "700" if stat.S_ISDIR(found.st_mode) else "600"
            problems.append(
                f"is open to others (mode {stat.S_IMODE(found.st_mode):o}): `chmod {wanted}` it, "
                "if nobody can have changed it"
            )
    if problems:
        raise LiveError(f"{path} " + "; and it ".join(problems))
