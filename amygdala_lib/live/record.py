"""Record: what a worker has done to a server's weights, kept so that the next worker goes on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .private import read_private_json, write_private_json

_LIMIT = 64 << 20  # bytes
_UNSAVED = 1000  # jobs that are named in the history of the next checkpoint


@dataclass
class Record:
    """Written whole at every change; what it says is what has happened.

    server: process number and start of the owner of the weights. optimizer: file of its memory in
    `optimizer/`, and its rank. parent: hash of the weights that the model folder is to hold.
    unsaved: the jobs since (the last 1000 of them, counted by n_unsaved). last: result of the last
    job that changed weights. checkpoint: the last one. doing: a checkpoint or rollback under way.
    version: one more whenever the weights have come to rest after a change, a change back included.
    """

    path: Path
    server: tuple[int, int] | None = None
    optimizer: str | None = None
    rank: int | None = None
    parent: str | None = None
    unsaved: list[dict[str, Any]] = field(default_factory=list)
    n_unsaved: int = 0
    last: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None
    doing: dict[str, Any] | None = None
    version: int = 0

    @classmethod
    def open(cls, path: Path) -> Record:
        """An empty one if there is none. Raises LiveError if it is damaged, or open to others."""
        if not path.exists():
            return cls(path)
        found = read_private_json(path, _LIMIT)
        known = {f.name for f in fields(cls)} - {"path"}
        record = cls(path, **{name: value for name, value in found.items() if name in known})
        record.server = tuple(record.server) if record.server else None
        return record

    def save(self) -> None:
        write_private_json(
            self.path, {key: value for key, value in asdict(self).items() if key != "path"}
        )

    def trained(self, brief: dict[str, Any]) -> None:
        """A job that the folder does not have yet; `save` is the caller's."""
        self.unsaved = [*self.unsaved, brief][-_UNSAVED:]
        self.n_unsaved += 1

    def nothing_unsaved(self) -> None:
        self.unsaved, self.n_unsaved = [], 0

    def begin_server(self, server: tuple[int, int]) -> bool:
        """Whether `server` is another one: its weights are those of the folder.

        The optimizer's memory goes on with them if the folder has all that was trained.
        """
        if self.server == server:
            return False
        if self.n_unsaved:
            self.optimizer = self.rank = None
        self.server, self.parent, self.doing, self.last = server, None, None, None
        self.nothing_unsaved()
        self.changed()
        return True

    def changed(self) -> None:
        """The weights are others, or have been for a while: what was computed with them is old."""
        self.version += 1
        self.save()
