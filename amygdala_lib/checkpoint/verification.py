"""Verification: is every byte of a model what it was when it was last written or verified?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .access import reading
from .hashes import Hashes
from .history import newest
from .shards import ModelFolder


@dataclass(frozen=True)
class Verification:
    """`hash` is of the whole model as it is; `differences` is empty if that is as recorded.

    `compared` is False if there was no record to compare with; `recorded`: there is one now.
    """

    path: Path
    hash: str
    weights: str
    differences: list[str]
    compared: bool
    recorded: bool
    n_bytes: int
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        read = f"{self.n_bytes:,} bytes read in {self.seconds:.2f} s, hash {self.hash[:12]}"
        if self.ok:
            found = "every byte is as it was" if self.compared else "nothing to compare with"
            return f"{self.path}: {found}{'; recorded' if self.recorded else ''} ({read})"
        return f"{self.path} is not as it was ({read}):\n" + "\n".join(self.differences)


def verify(folder: Path | str, *, wait: float = 0, progress: bool = True) -> Verification:
    """Read every byte of a model and compare its hashes with those recorded.

    They are recorded by `sync` and its like, and by the first `verify`. Names each tensor, header
    and file (configuration, tokenizer) that differs; damage that left a file's size and time as
    they were is found too. Costs one SHA-256 of everything, in as many threads as torch uses.

    Raises CheckpointError if a shard cannot be read at all, or the folder is being written to.
    """
    with reading(folder, wait=wait) as path:
        start = time.perf_counter()
        opened = ModelFolder.open(path)
        now, then = Hashes.computed(opened, progress=progress), Hashes.recorded(opened)
        differences = list(_differences(now, then)) if then else []
        last = newest(path)
        if then is None and last is not None and last.applies_to != now.weights:
            differences.append(
                f"the weights are not those the last change led to ({last.applies_to[:12]})"
            )
        recorded = False
        if not differences:
            with suppress(OSError):  # one that cannot be written to has nowhere to keep a record
                now.save()
                recorded = True
        return Verification(
            path=path,
            hash=now.root,
            weights=now.weights,
            differences=differences,
            compared=then is not None or last is not None,
            recorded=recorded,
            n_bytes=opened.n_bytes,
            seconds=time.perf_counter() - start,
        )


def _differences(now: Hashes, then: Hashes) -> Iterator[str]:
    for name in sorted(now.leaves.keys() | then.leaves.keys()):
        if name not in now.leaves:
            yield f"tensor {name} is gone"
        elif name not in then.leaves:
            yield f"tensor {name} is new"
        elif len(now.leaves[name]) != len(then.leaves[name]):
            yield f"tensor {name} is of another size"
        else:
            leaves = zip(now.leaves[name], then.leaves[name], strict=True)
            pieces = zip(now.folder.tensors[name].pieces(), leaves, strict=True)
            if differing := [piece for piece, (a, b) in pieces if a != b]:
                yield (
                    f"tensor {name} differs in {len(differing)} of {len(now.leaves[name])} pieces, "
                    f"the first {differing[0].start:,} bytes in"
                )
    for shard in sorted(now.stamps.keys() & then.stamps.keys()):
        if now.stamps[shard][-1] != then.stamps[shard][-1]:
            yield f"the header of {shard} differs"
    for name in sorted(now.files.keys() | then.files.keys()):
        if name not in now.files:
            yield f"file {name} is gone"
        elif name not in then.files:
            yield f"file {name} is new"
        elif now.files[name] != then.files[name]:
            yield f"file {name} differs"
