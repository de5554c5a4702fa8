"""Work on many pieces in a few threads: numpy, hashing and zstd let go of the interpreter."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from .shards import Piece

Result = TypeVar("Result")
_MOST = 4  # each holds some pieces in memory, and disks are no faster for more


def each_piece(
    function: Callable[[Piece], Result], pieces: Sequence[Piece], what: str, progress: bool
) -> Iterator[tuple[Piece, Result]]:
    """Each piece with what `function` makes of it, in order, in as many threads as torch uses.

    At most 4 threads; no more than two results a thread are waiting, so that memory stays bounded.
    An exception in `function` ends it. A bar is shown if it takes longer than two seconds.
    """
    results = zip(pieces, _in_order(function, pieces), strict=True)
    if not progress:  # even a disabled bar takes a lock that forked processes share
        yield from results
        return
    total = sum(piece.n_bytes for piece in pieces)
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=2) as bar:
        for piece, result in results:
            yield piece, result
            bar.update(piece.n_bytes)


def _in_order(function: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[Result]:
    threads = min(torch.get_num_threads(), _MOST)
    if threads == 1:
        yield from map(function, pieces)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for piece in pieces:
                waiting.append(pool.submit(function, piece))
                if len(waiting) == 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
