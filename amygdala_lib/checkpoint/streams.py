"""Streams: numbers and tensor elements as bytes that zstd brings close to their entropy."""

from __future__ import annotations

import struct

import numpy as np
import zstandard
from jaxtyping import UInt, UInt8

from ..errors import CheckpointError

Data = UInt8[np.ndarray, " bytes"]
Numbers = UInt[np.ndarray, " numbers"]

_LOOKED_AT = 1 << 12
"""Numbers by which the bits of a symbol are chosen."""
_LENGTH = struct.Struct("<I")
_FORM = struct.Struct("<BB")
_ZSTD = zstandard.ZstdCompressionParameters(
    format=zstandard.FORMAT_ZSTD1_MAGICLESS,
    write_content_size=False,
    window_log=20,
    # Hardly anything here repeats itself. A chance repeat takes more bytes than Huffman codes of
    # the same: look for long ones only, and remember few.
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
)


def damaged(reason: str) -> CheckpointError:
    return CheckpointError(f"the delta is damaged: {reason}. Use another copy of it")


class Source:
    """A payload, read from its start. Its methods raise CheckpointError if that is damaged."""

    def __init__(self, content: bytes | memoryview):
        self._left = memoryview(content)

    @property
    def exhausted(self) -> bool:
        return not self._left

    def unpack(self, form: struct.Struct) -> tuple:
        return form.unpack(self._take(form.size))

    def stream(self, n_bytes: int) -> Data:
        """What `_stream` was given, which was of this length."""
        (stored,) = self.unpack(_LENGTH)
        content = self._take(stored)
        if stored != n_bytes:
            reader = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
            try:
                content = reader.decompress(
                    content, max_output_size=n_bytes, allow_extra_data=False
                )
            except zstandard.ZstdError as error:
                raise damaged(f"it does not decompress ({error})") from error
            if len(content) != n_bytes:
                raise damaged(f"{len(content)} bytes are where {n_bytes} were")
        return np.frombuffer(content, np.uint8)

    def _take(self, n_bytes: int) -> memoryview:
        if n_bytes > len(self._left):
            raise damaged("it ends too early")
        taken, self._left = self._left[:n_bytes], self._left[n_bytes:]
        return taken


def _stream(raw: bytes) -> bytes:
    """Its stored length, then it: compressed if that is shorter."""
    compressed = zstandard.ZstdCompressor(compression_params=_ZSTD).compress(raw)
    stored = compressed if len(compressed) < len(raw) else raw
    return _LENGTH.pack(len(stored)) + stored


def pack_numbers(numbers: Numbers) -> bytes:
    """Numbers of which most are small, or of one magnitude: gaps, distances.

    Each is a symbol of 2, 4 or 8 bits and, below it, bits as they are. The highest symbol stands
    for itself and all above: what these exceed it by are numbers again, fewer than half as many.
    Symbols and rests are worth, together, what the numbers are worth (the chain rule of entropy);
    low bits are as good as random where numbers are geometric, as gaps between independent changes
    are. Narrow symbols share bytes, for a Huffman code takes one bit a byte at least.
    """
    parts = []
    while len(numbers):
        width, n_low = _form(numbers)
        top = (1 << width) - 1
        high = numbers >> n_low
        parts.append(_FORM.pack(width, n_low))
        parts.append(_stream(_packed(np.minimum(high, top).astype(np.uint8), width)))
        if n_low:
            planes = [np.packbits((numbers & (1 << bit)) != 0) for bit in range(n_low)]
            parts.append(_stream(np.concatenate(planes).tobytes()))
        numbers = high[high >= top] - top
    return b"".join(parts)


def unpack_numbers(source: Source, n: int, dtype: np.dtype) -> Numbers:
    """`n` numbers that `pack_numbers` wrote, in an unsigned `dtype` that holds them."""
    if not n:
        return np.empty(0, dtype)
    width, n_low = source.unpack(_FORM)
    if width not in (2, 4, 8) or n_low >= 8 * dtype.itemsize:
        raise damaged(f"there are no symbols of {width} bits above {n_low}")
    symbols = _unpacked(source.stream(-(-n * width // 8)), n, width)
    numbers = symbols.astype(dtype) << n_low
    if n_low:
        for bit, plane in enumerate(source.stream(n_low * -(-n // 8)).reshape(n_low, -1)):
            numbers |= np.unpackbits(plane, count=n).astype(dtype) << bit
    more = symbols == (1 << width) - 1
    n_more = int(np.count_nonzero(more))
    if 2 * n_more > n:
        raise damaged("too many of its numbers exceed their symbols")
    numbers[more] += unpack_numbers(source, n_more, dtype) << n_low
    return numbers


def _form(numbers: Numbers) -> tuple[int, int]:
    """The bits of a symbol, and those below it, with which fewer than half exceed their symbol."""
    for step in (-(-len(numbers) // _LOOKED_AT), 1):  # a sample misleads now and then
        seen = numbers[::step]
        median = int(np.partition(seen, len(seen) // 2)[len(seen) // 2])
        width = 2 if median <= 2 else 4 if median <= 10 else 8
        n_low = max(0, median.bit_length() - 4) if width == 8 else 0
        if 2 * np.count_nonzero(numbers >> n_low >= (1 << width) - 1) < len(numbers):
            break
    return width, n_low


def _packed(symbols: UInt8[np.ndarray, " symbols"], width: int) -> bytes:
    """Symbols of `width` bits, as many to a byte as go into it, the first lowest."""
    per_byte = 8 // width
    padded = np.append(symbols, np.zeros(-len(symbols) % per_byte, np.uint8))
    packed = padded[::per_byte].copy()
    for i in range(1, per_byte):
        packed |= padded[i::per_byte] << (width * i)
    return packed.tobytes()


def _unpacked(content: Data, n: int, width: int) -> UInt8[np.ndarray, " symbols"]:
    symbols = np.empty((len(content), 8 // width), np.uint8)
    for i in range(8 // width):
        symbols[:, i] = (content >> (width * i)) & ((1 << width) - 1)
    return symbols.reshape(-1)[:n]


def pack_values(values: Numbers) -> bytes:
    """Elements of a tensor in byte planes, so that exponents and mantissas compress apart.

    The sign is moved below the mantissa, so that the first plane is all of a bfloat16's exponent.
    """
    turned = (values << 1) | (values >> (8 * values.itemsize - 1))
    planes = turned.view(np.uint8).reshape(-1, values.itemsize).T
    return b"".join(_stream(plane.tobytes()) for plane in planes)


def unpack_values(source: Source, n: int, dtype: np.dtype) -> Numbers:
    """`n` elements that `pack_values` wrote, in their little-endian unsigned `dtype`."""
    planes = [source.stream(n) for _ in range(dtype.itemsize)]
    turned = np.stack(planes, axis=1).reshape(-1).view(dtype)
    return (turned >> 1) | (turned << (8 * dtype.itemsize - 1))


def distances(before: Numbers, after: Numbers) -> Numbers:
    """How many representable numbers lie from `before` to `after`, element by element.

    Both are the bits of floats, or of integers. Numbers of one sign are in the order of their bits;
    0, 1, 2, 3, 4 ... say none, one down, one up, two down, two up ...
    """
    up = _ordered(after) - _ordered(before)
    return (up << 1) ^ _ones_if_negative(up)


def moved(before: Numbers, distances: Numbers) -> Numbers:
    """What lies at these `distances` from `before`."""
    up = (distances >> 1) ^ (-(distances & 1))
    ordered = _ordered(before) + up
    return ordered ^ (~_ones_if_negative(ordered) | _top_bit(ordered))


def _ordered(bits: Numbers) -> Numbers:
    """Unsigned integers in the order of the floats of which these are the bits."""
    return bits ^ (_ones_if_negative(bits) | _top_bit(bits))


def _ones_if_negative(bits: Numbers) -> Numbers:
    signed = bits.view(bits.dtype.str.replace("u", "i"))
    return (signed >> (8 * bits.itemsize - 1)).view(bits.dtype)


def _top_bit(bits: Numbers) -> np.unsignedinteger:
    return bits.dtype.type(1 << (8 * bits.itemsize - 1))
