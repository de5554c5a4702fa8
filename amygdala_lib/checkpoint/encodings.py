"""Encodings: what turns one tensor's bytes into another's, in about as few as the change allows.

A payload is a header and a row of pieces. A piece names units, which are elements or blocks of
4 KB, by the gaps between them. It says what each becomes, either by its bytes or by how many
representable numbers lie between old and new, which for small updates is far less to say.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from ..errors import CheckpointError
from .streams import (
    Data,
    Numbers,
    Source,
    damaged,
    distances,
    moved,
    pack_numbers,
    pack_values,
    unpack_numbers,
    unpack_values,
)

Kind = Literal["whole", "blocks", "elements"]
KINDS: tuple[Kind, ...] = ("whole", "blocks", "elements")
"""All blocks of 4 KB, those with a change, or single elements; the first wins a tie."""
BLOCK = 4096
ITEM_SIZES = (1, 2, 4, 8)

Blocks = Bool[np.ndarray, " blocks"]
Positions = Int64[np.ndarray, " units"]

_FORMAT = 1
_PIECE = 1 << 19
"""Elements of a piece, or up to twice as many: this bounds memory, whatever the tensor."""
_SAMPLED = 16
"""Blocks by which a kind's size is foretold; in a tensor of so many, all kinds are measured."""
_MARGIN = 1.05
"""How far above the lowest a foretold size may be for the kind to be measured."""
_COMPARED = 1 << 12
"""Elements by which distances are weighed against values."""
_DIGEST = 8
_HEADER = struct.Struct(f"<BBBBQ{_DIGEST}s")
_PIECE_HEADER = struct.Struct("<IB")


class _Header(NamedTuple):
    format: int
    kind: int
    itemsize: int
    relative: int
    length: int
    result: bytes
    """Digest of which units change and what they become."""

    @property
    def unit(self) -> int:
        return _unit(KINDS[self.kind], self.itemsize)


@dataclass(frozen=True)
class Encoded:
    """What turns one tensor into another. `payload` is all of it, and can be kept in a file."""

    payload: bytes

    @property
    def kind(self) -> Kind:
        """Which units it names. Raises CheckpointError for what is no payload."""
        return KINDS[self._header().kind]

    @property
    def relative(self) -> bool:
        """Whether it fits the old tensor only. Raises CheckpointError for what is no payload."""
        return bool(self._header().relative)

    def apply(self, target: Data) -> None:
        """Turn `target`, all bytes of a tensor, into the new tensor, in place.

        If not `relative`, the payload holds the new values themselves: `target` may be old, new, or
        any mixture of the two that a killed write has left. If `relative`, the units it names must
        all be old, or all new; the others are not looked at. A target that is new already is not
        written to.

        Raises CheckpointError, before a byte of it is changed, for a damaged payload, and for a
        target that cannot be written to, is of another length or, if `relative`, not the old one.
        """
        body = memoryview(self.payload)[_DIGEST:]
        if blake2b(body, digest_size=_DIGEST).digest() != self.payload[:_DIGEST]:
            raise damaged("its checksum does not match")
        header = self._header()
        _check_target(target, header.length)
        present, reached = (blake2b(digest_size=_DIGEST) for _ in range(2))
        for positions, values in self._changes(header, target):
            where = positions.astype("<i8", copy=False)
            present.update(where)
            present.update(_taken(target, positions, header.unit))
            reached.update(where)
            reached.update(values)
        if present.digest() == header.result:
            return
        if reached.digest() != header.result:
            if header.relative:
                raise CheckpointError(
                    "the tensor is not the one this delta starts from: apply it to a copy of that"
                )
            raise damaged("it does not decode to what was encoded")
        for positions, values in self._changes(header, target):
            _put(target, positions, header.unit, values)

    def _header(self) -> _Header:
        stored = self.payload[_DIGEST : _DIGEST + _HEADER.size]
        if len(stored) < _HEADER.size:
            raise damaged(f"{len(self.payload)} bytes are less than its header")
        header = _Header(*_HEADER.unpack(stored))
        if header.format != _FORMAT:
            raise damaged(f"this version reads format {_FORMAT}, and it is of {header.format}")
        if header.kind >= len(KINDS) or header.itemsize not in ITEM_SIZES:
            raise damaged(f"there is no kind {header.kind} for elements of {header.itemsize} bytes")
        if header.length % header.itemsize:
            raise damaged(f"{header.length} bytes are no elements of {header.itemsize}")
        return header

    def _changes(self, header: _Header, target: Data) -> Iterator[tuple[Positions, Data]]:
        """Units in ascending order and what they become, piece by piece.

        Distances are counted from what `target` holds.
        """
        source = Source(memoryview(self.payload)[_DIGEST + _HEADER.size :])
        n_units = -(-header.length // header.unit)
        previous = -1
        while not source.exhausted:
            n, near = source.unpack(_PIECE_HEADER)
            if not 0 < n < n_units - previous:
                raise damaged(f"{n} units are where {n_units - previous - 1} are left")
            gaps = unpack_numbers(source, n, np.dtype(np.uint64))
            positions = previous + np.cumsum(gaps.view(np.int64) + 1)
            if gaps.max() >= n_units or positions[-1] >= n_units:
                raise damaged("it names units beyond the end of the tensor")
            previous = int(positions[-1])
            before = _elements(_taken(target, positions, header.unit), header.itemsize)
            if near:
                after = moved(before, unpack_numbers(source, len(before), before.dtype))
            else:
                after = unpack_values(source, len(before), before.dtype)
            yield positions, after.view(np.uint8)


def encode(old: Data, new: Data, itemsize: int, relative: bool = False) -> Encoded:
    """What turns `old` into `new`, the bytes of two tensors, as the kind that takes fewest.

    `itemsize` is the bytes of an element: 1, 2, 4 or 8, bit patterns of floats or integers. Without
    `relative`, what comes out can be applied over a half-written tensor, as undoing a killed write
    needs it. With `relative` it may count from the old values, which for small updates takes
    several times fewer bytes, and it can be applied to `old` only.

    In a tensor of more than 64 KB, kinds that a sample of the changed blocks puts more than 5%
    above the best are not encoded in full, nor is `whole` unless every block has a change. Memory:
    two payloads at most and some 50 MB, whatever the tensor. Raises CheckpointError for lengths
    that differ or are no multiple of `itemsize`, and for arrays that are not contiguous bytes.
    """
    _check_pair(old, new, itemsize)
    n_changed, dirty = _survey(old, new, itemsize)
    kinds = _promising(old, new, itemsize, relative, n_changed, dirty)
    payloads = (_payload(kind, old, new, itemsize, relative, dirty) for kind in kinds)
    return Encoded(min(payloads, key=len))


def encode_as(kind: Kind, old: Data, new: Data, itemsize: int, relative: bool = False) -> Encoded:
    """What turns `old` into `new` as this kind, to see what each would take; otherwise as `encode`.

    Raises CheckpointError as `encode` does, and for a kind that there is not.
    """
    _check_pair(old, new, itemsize)
    if kind not in KINDS:
        raise CheckpointError(f"there is no kind {kind!r}: there are {', '.join(KINDS)}")
    _, dirty = _survey(old, new, itemsize)
    return Encoded(_payload(kind, old, new, itemsize, relative, dirty))


def _survey(old: Data, new: Data, itemsize: int) -> tuple[int, Blocks]:
    """How many elements differ, and which blocks do."""
    per_block = BLOCK // itemsize
    n_changed, dirty = 0, np.zeros(-(-len(old) // BLOCK), dtype=bool)
    for blocks, stretch in _chunks(len(old), itemsize):
        differ = _elements(old[stretch], itemsize) != _elements(new[stretch], itemsize)
        if n_here := int(np.count_nonzero(differ)):
            n_changed += n_here
            differ = np.append(differ, np.zeros(-len(differ) % per_block, dtype=bool))
            dirty[blocks] = differ.reshape(-1, per_block).any(axis=1)
    return n_changed, dirty


def _promising(
    old: Data, new: Data, itemsize: int, relative: bool, n_changed: int, dirty: Blocks
) -> list[Kind]:
    """The kinds that may turn out to be the smallest, judged by a sample of the blocks."""
    if not n_changed:
        return ["elements"]
    if len(dirty) <= _SAMPLED:
        return list(KINDS)

    touched = np.flatnonzero(dirty)
    few = touched[:: max(1, len(touched) // _SAMPLED)]
    sample = [_taken(data, few, BLOCK) for data in (old, new)]
    n_here, dirty_here = _survey(*sample, itemsize)

    def foretold(kind: Kind) -> float:
        n_bytes = len(_payload(kind, *sample, itemsize, relative, dirty_here))
        return n_bytes * (n_changed / n_here if kind == "elements" else len(touched) / len(few))

    # Whole says all that blocks do, and more: it saves naming them, which is a bit each at most.
    all_or_some: Kind = "whole" if dirty.all() else "blocks"
    sizes = {kind: foretold(kind) for kind in (all_or_some, "elements")}
    return [kind for kind in sizes if sizes[kind] <= _MARGIN * min(sizes.values())]


def _payload(
    kind: Kind, old: Data, new: Data, itemsize: int, relative: bool, dirty: Blocks
) -> bytes:
    unit = _unit(kind, itemsize)
    result = blake2b(digest_size=_DIGEST)
    file = BytesIO()
    file.seek(_DIGEST + _HEADER.size)
    previous, any_near = -1, False
    found = _positions(kind, old, new, itemsize, dirty)
    for positions in _batches(found, _PIECE * itemsize // unit):
        gaps = np.diff(positions, prepend=previous) - 1
        previous = positions[-1]
        before = _elements(_taken(old, positions, unit), itemsize)
        after = _elements(_taken(new, positions, unit), itemsize)
        result.update(positions.astype("<i8", copy=False))
        result.update(after)
        near = relative and _is_near(before, after)
        any_near |= near
        file.write(_PIECE_HEADER.pack(len(positions), near))
        file.write(pack_numbers(gaps.view(np.uint64)))
        file.write(pack_numbers(distances(before, after)) if near else pack_values(after))
    header = _Header(_FORMAT, KINDS.index(kind), itemsize, any_near, len(old), result.digest())
    file.seek(_DIGEST)
    file.write(_HEADER.pack(*header))
    checksum = blake2b(file.getbuffer()[_DIGEST:], digest_size=_DIGEST).digest()
    file.seek(0)
    file.write(checksum)
    return file.getvalue()


def _is_near(before: Numbers, after: Numbers) -> bool:
    """Whether distances take fewer bytes than the values themselves, judged by a sample."""
    step = max(1, len(after) // _COMPARED)
    before, after = before[::step], after[::step]
    return len(pack_numbers(distances(before, after))) < len(pack_values(after))


def _positions(
    kind: Kind, old: Data, new: Data, itemsize: int, dirty: Blocks
) -> Iterator[Positions]:
    """The units of a kind, in ascending order, some at a time."""
    for blocks, stretch in _chunks(len(old), itemsize):
        if kind == "whole":
            yield np.arange(blocks.start, blocks.stop)
        elif kind == "blocks":
            yield blocks.start + np.flatnonzero(dirty[blocks])
        elif dirty[blocks].any():
            differ = _elements(old[stretch], itemsize) != _elements(new[stretch], itemsize)
            yield stretch.start // itemsize + np.flatnonzero(differ)


def _chunks(n_bytes: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the blocks, each with the slice of bytes that they are."""
    n_blocks, per_chunk = -(-n_bytes // BLOCK), _PIECE * itemsize // BLOCK
    for start in range(0, n_blocks, per_chunk):
        stop = min(start + per_chunk, n_blocks)
        yield slice(start, stop), slice(start * BLOCK, min(stop * BLOCK, n_bytes))


def _batches(found: Iterable[Positions], least: int) -> Iterator[Positions]:
    """The same positions, at least so many at a time but for the last."""
    held: list[Positions] = []
    for positions in found:
        held.append(positions)
        if sum(map(len, held)) >= least:
            yield np.concatenate(held)
            held = []
    if any(map(len, held)):
        yield np.concatenate(held)


def _elements(data: Data, itemsize: int) -> Numbers:
    return data.view(f"<u{itemsize}")


def _unit(kind: Kind, itemsize: int) -> int:
    """The bytes of what a position counts."""
    return itemsize if kind == "elements" else BLOCK


def _taken(data: Data, positions: Positions, unit: int) -> Data:
    """A copy of the units at these ascending positions; the last of a tensor may be shorter."""
    n_full = len(data) // unit
    full = data[: n_full * unit].view(f"V{unit}")
    if positions[-1] < n_full:
        return full[positions].view(np.uint8)
    return np.append(full[positions[:-1]].view(np.uint8), data[n_full * unit :])


def _put(data: Data, positions: Positions, unit: int, values: Data) -> None:
    """Write `values` where `_taken` would read them."""
    n_full = len(data) // unit
    if positions[-1] == n_full:
        positions, end = positions[:-1], len(data) - n_full * unit
        data[n_full * unit :] = values[-end:]
        values = values[:-end]
    data[: n_full * unit].view(f"V{unit}")[positions] = values.view(f"V{unit}")


def _check_pair(old: Data, new: Data, itemsize: int) -> None:
    problems = [*_not_bytes("the old tensor", old), *_not_bytes("the new tensor", new)]
    if itemsize not in ITEM_SIZES:
        problems.append(f"elements have 1, 2, 4 or 8 bytes, not {itemsize!r}")
    elif not problems and len(old) % itemsize:
        problems.append(f"{len(old)} bytes are no multiple of an element's {itemsize}")
    if not problems and len(old) != len(new):
        problems.append(f"{len(old)} bytes do not become {len(new)}: pass tensors of one shape")
    if problems:
        raise CheckpointError("\n".join(problems))


def _check_target(target: Data, length: int) -> None:
    problems = _not_bytes("the target", target)
    if not problems:
        if len(target) != length:
            problems.append(f"the delta is for a tensor of {length} bytes, not of {len(target)}")
        if not target.flags.writeable:
            problems.append("the target is read-only: pass a copy, or map its file for writing")
    if problems:
        raise CheckpointError("\n".join(problems))


def _not_bytes(name: str, data: Data) -> list[str]:
    if not isinstance(data, np.ndarray):
        return [f"{name} must be a numpy array of bytes, not {type(data).__name__}"]
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
        held = f"{data.dtype} of shape {data.shape}"
        held += "" if data.flags.c_contiguous else " with gaps"
        return [f"{name} must be contiguous bytes in one dimension, not {held}"]
    return []
