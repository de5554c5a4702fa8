"""Deltas lead from old to new and nowhere else, in about as few bytes as the change is worth."""

import struct
import tracemalloc
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amygdala_lib.checkpoint.encodings import (
    BLOCK,
    ITEM_SIZES,
    KINDS,
    Encoded,
    encode,
    encode_as,
)
from amygdala_lib.checkpoint.streams import (
    Source,
    distances,
    moved,
    pack_numbers,
    pack_values,
    unpack_numbers,
    unpack_values,
)
from amygdala_lib.errors import CheckpointError

UNSIGNED = {size: np.dtype(f"<u{size}") for size in ITEM_SIZES}


def rng(seed=0):
    return np.random.default_rng(seed)


def as_bytes(elements):
    return np.ascontiguousarray(elements).view(np.uint8)


def weights(n, seed=0):
    """Bits of bfloat16 weights."""
    drawn = rng(seed).standard_normal(n, np.float32) * np.float32(0.02)
    return (drawn.view(np.uint32) >> 16).astype(np.uint16)


def few_ulp(elements, seed=1):
    """Each one to four representable numbers away, eight ways that are equally likely."""
    steps = rng(seed).integers(1, 5, len(elements)) * rng(seed + 1).choice([-1, 1], len(elements))
    return (elements.astype(np.int64) + steps).astype(elements.dtype)


def scattered(n, density, seed=2):
    return rng(seed).random(n) < density


def stretch(n, density):
    return np.arange(n) // max(1, int(n * density)) == 1


def changed(old, where, seed=1, change=few_ulp):
    new = old.copy()
    new[where] = change(old[where], seed)
    return new


def redrawn(elements, seed=1):
    return rng(seed).integers(0, 1 << (8 * elements.itemsize), len(elements), elements.dtype)


def applied(encoded, target):
    found = as_bytes(target).copy()
    encoded.apply(found)
    return found


@st.composite
def changes(draw, least=0):
    """Two tensors of any element size and length, that differ in any way."""
    itemsize = draw(st.sampled_from(ITEM_SIZES))
    n = draw(st.integers(least, 3 * BLOCK // itemsize) | st.integers(least, 40))
    seed = draw(st.integers(0, 99))
    old = redrawn(np.empty(n, UNSIGNED[itemsize]), seed)
    if draw(st.booleans()):
        old &= UNSIGNED[itemsize].type(3)
    density = draw(st.sampled_from([0.0, 0.001, 0.03, 0.5, 0.99, 1.0]))
    where = draw(st.sampled_from([scattered, stretch]))(n, density)
    if n and draw(st.booleans()):
        where[draw(st.integers(0, n - 1))] = True
    made = draw(st.sampled_from([few_ulp, redrawn, lambda found, seed: np.zeros_like(found)]))
    return as_bytes(old), as_bytes(changed(old, where, seed, made)), itemsize


# What a delta does


@given(change=changes(), relative=st.booleans(), offset=st.integers(0, 7))
def test_a_delta_turns_old_into_new_wherever_it_lies_in_memory(change, relative, offset):
    old, new, itemsize = change
    room = np.zeros(offset + len(old), np.uint8)
    room[offset:] = old
    before = old.copy()
    encoded = encode(room[offset:], new, itemsize, relative)
    assert np.array_equal(room[offset:], before) and np.array_equal(old, before)
    Encoded(encoded.payload).apply(room[offset:])
    assert np.array_equal(room[offset:], new) and not room[:offset].any()
    assert encoded.kind in KINDS and relative >= encoded.relative


@given(change=changes(), seed=st.integers(0, 99))
def test_a_delta_of_values_mends_any_mixture_of_old_and_new(change, seed):
    old, new, itemsize = change
    encoded = encode(old, new, itemsize)
    torn = np.where(rng(seed).random(len(old)) < 0.5, old, new)
    assert np.array_equal(applied(encoded, torn), new)
    assert np.array_equal(applied(encoded, new), new)


@given(change=changes(least=1), at=st.integers(0, 1 << 20))
def test_a_relative_delta_refuses_what_is_neither_all_old_nor_all_new(change, at):
    old, new, itemsize = change
    encoded = encode(old, new, itemsize, relative=True)
    assert np.array_equal(applied(encoded, new), new)
    differing = np.flatnonzero(old != new)
    if encoded.relative:
        other = old.copy()
        other[differing[at % len(differing)]] ^= 0x5A
        torn = np.where(np.arange(len(old)) < differing[-1], old, new)
        for target in (other, torn):
            start = target.copy()
            if not np.array_equal(target, new) and not np.array_equal(target, old):
                with pytest.raises(CheckpointError, match="not the one this delta starts from"):
                    encoded.apply(target)
                assert np.array_equal(target, start)


def test_a_small_update_is_coded_relative_and_a_new_tensor_is_not():
    old = weights(20_000)
    for new, relative in ((few_ulp(old), True), (redrawn(old), False)):
        assert encode(as_bytes(old), as_bytes(new), 2, relative=True).relative is relative
        assert encode(as_bytes(old), as_bytes(new), 2).relative is False


@pytest.mark.parametrize("relative", [False, True])
def test_elements_that_did_not_change_are_neither_read_nor_written(relative):
    old = weights(50_000)
    new = changed(old, scattered(len(old), 0.01))
    encoded = encode(as_bytes(old), as_bytes(new), 2, relative)
    assert encoded.kind == "elements"
    elsewhere = old ^ (old == new).astype(np.uint16)
    expected = np.where(old == new, elsewhere, new)
    assert np.array_equal(applied(encoded, elsewhere), as_bytes(expected))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("itemsize", ITEM_SIZES)
@pytest.mark.parametrize(
    ("where", "change"), [(scattered, few_ulp), (scattered, redrawn), (stretch, redrawn)]
)
def test_tensors_of_many_pieces_are_put_together_again(itemsize, relative, where, change):
    old = redrawn(np.empty(1_100_003, UNSIGNED[itemsize]), 0)
    new = changed(old, where(len(old), 0.9), change=change)
    encoded = encode(as_bytes(old), as_bytes(new), itemsize, relative)
    assert np.array_equal(applied(encoded, old), as_bytes(new))


def test_a_change_of_nothing_is_a_header_and_writes_nothing():
    for n in (0, 1, 3 * BLOCK + 17):
        same = np.zeros(n, np.uint8)
        encoded = encode(same, same.copy(), 1)
        assert len(encoded.payload) < 40
        other = np.ones(n, np.uint8)
        encoded.apply(other)
        assert other.all(), "it says nothing about any element"


def test_the_same_change_is_the_same_bytes():
    old = weights(100_000)
    new = changed(old, scattered(len(old), 0.1))
    for relative in (False, True):
        once, again = (encode(as_bytes(old), as_bytes(new), 2, relative) for _ in range(2))
        assert once == again


# How small it is


def entropy(p):
    """Bits per element of where changes are that come independently with probability p."""
    return -p * np.log2(p) - (1 - p) * np.log2(1 - p)


@pytest.mark.parametrize("density", [0.0001, 0.001, 0.01, 0.1, 0.5])
def test_independent_changes_take_little_more_than_their_entropy(density):
    n = 4_000_000 if density < 0.01 else 500_000
    old, where = weights(n), scattered(n, density)
    for change, bits, relative in ((few_ulp, 3, True), (redrawn, 16, False), (redrawn, 16, True)):
        encoded = encode(as_bytes(old), as_bytes(changed(old, where, 5, change)), 2, relative)
        worth = n * (entropy(density) + density * bits) / 8
        assert len(encoded.payload) < 1.05 * worth + 150, (change, len(encoded.payload) / worth)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 1])
def test_where_a_contiguous_change_is_costs_next_to_nothing(density):
    n = 500_000
    old, where = weights(n), stretch(n + 1, density)[:n] if density < 1 else np.ones(n, bool)
    for change, bits, relative in ((few_ulp, 3, True), (redrawn, 16, False), (redrawn, 16, True)):
        encoded = encode(as_bytes(old), as_bytes(changed(old, where, 5, change)), 2, relative)
        worth = where.sum() * bits / 8
        assert len(encoded.payload) < 1.02 * worth + 150, (change, len(encoded.payload) / worth)


def test_the_exponents_of_weights_are_compressed():
    old, new = weights(500_000), weights(500_000, seed=3)
    exponents = np.bincount((new >> 7) & 0xFF)
    share = exponents[exponents > 0] / exponents.sum()
    worth = len(new) * (8 - (share * np.log2(share)).sum()) / 8  # a sign and 7 bits of mantissa
    for relative in (False, True):
        assert len(encode(as_bytes(old), as_bytes(new), 2, relative).payload) < 1.02 * worth


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("elements", lambda n: scattered(n, 0.01)),
        ("blocks", lambda n: np.repeat(scattered(n // 2048, 0.1), 2048)),
        ("whole", lambda n: np.ones(n, bool)),
    ],
)
@pytest.mark.parametrize("n_blocks", [10, 300])
def test_each_kind_is_chosen_where_it_is_the_smallest(kind, where, n_blocks):
    n = n_blocks * BLOCK // 2
    old = weights(n)
    # Some of the new elements come out as they were: naming those that did not is dearer then.
    new = np.where(where(n), weights(n, seed=9), old)
    encoded = encode(as_bytes(old), as_bytes(new), 2)
    assert encoded.kind == kind


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("where", [scattered, stretch])
@pytest.mark.parametrize("change", [few_ulp, redrawn, lambda found, _: np.zeros_like(found)])
def test_no_other_kind_would_have_been_smaller(where, density, change, relative):
    for n, tolerance in ((14 * BLOCK, 1), (60 * BLOCK, 1.06)):
        old = weights(n // 2)
        new = changed(old, where(len(old), density), change=change)
        before, after = as_bytes(old), as_bytes(new)
        each = [encode_as(kind, before, after, 2, relative) for kind in KINDS]
        assert [encoded.kind for encoded in each] == list(KINDS)
        assert all(np.array_equal(applied(encoded, before), after) for encoded in each)
        sizes = [len(encoded.payload) for encoded in each]
        found = len(encode(before, after, 2, relative).payload)
        assert found <= tolerance * min(sizes) + 20, sizes
        assert found in sizes


def test_memory_does_not_grow_with_the_tensor():
    peaks, payloads = [], []
    for megabytes in (8, 32):
        old = weights(megabytes << 19)
        before, after = as_bytes(old), as_bytes(changed(old, scattered(len(old), 0.2)))
        tracemalloc.start()
        encoded = encode(before, after, 2)
        encoded.apply(before)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        payloads.append(len(encoded.payload))
    assert peaks[1] - peaks[0] < 2.3 * (payloads[1] - payloads[0])
    assert peaks[1] - 2.3 * payloads[1] < 50e6


# What it refuses


def sealed(body):
    return blake2b(body, digest_size=8).digest() + body


def examples():
    """A delta of each kind, of values and relative, and the tensor it is for."""
    n = 3 * BLOCK // 2 + 50
    old = weights(n)
    places = {"elements": scattered(n, 0.01), "blocks": np.arange(n) < 2048, "whole": np.ones(n)}
    for relative in (False, True):
        for kind, where in places.items():
            new = changed(old, where.astype(bool))
            before, after = as_bytes(old), as_bytes(new)
            payload = encode_as(kind, before, after, 2, relative).payload
            yield pytest.param(before, after, payload, id=f"{kind}, relative {relative}")


@pytest.mark.parametrize(("old", "new", "payload"), list(examples()))
def test_damage_anywhere_is_refused_and_nothing_written(old, new, payload):
    assert np.array_equal(applied(Encoded(payload), old), new)
    places = range(0, len(payload), max(1, len(payload) // 200))
    damaged = [
        payload[:at] + bytes([payload[at] ^ 1 << at % 8]) + payload[at + 1 :] for at in places
    ]
    damaged += [payload[:at] for at in places] + [payload + b"\0", payload * 2, b"no delta at all"]
    for found in damaged:
        target = old.copy()
        with pytest.raises(CheckpointError, match="the delta is damaged"):
            Encoded(found).apply(target)
        assert np.array_equal(target, old)


@pytest.mark.parametrize(("old", "new", "payload"), list(examples()))
def test_a_payload_that_was_made_wrong_writes_nothing_either(old, new, payload):
    body = payload[8:]
    generator = rng(4)
    places = [*range(70), *generator.integers(0, len(body), 100)]
    refused = 0
    for at in places:
        wrong = bytearray(body)
        wrong[at] = generator.integers(0, 256)
        target = old.copy()
        try:
            Encoded(sealed(bytes(wrong))).apply(target)
        except CheckpointError:
            refused += 1
            assert np.array_equal(target, old)
        else:
            assert np.array_equal(target, new)
    assert refused > 0.9 * len(places)
    for wrong in (body[:-1], body[: len(body) // 2], body + b"\0" * 5, body + body[20:]):
        target = old.copy()
        with pytest.raises(CheckpointError):
            Encoded(sealed(wrong)).apply(target)
        assert np.array_equal(target, old)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (dict(format=9), "it is of 9"),
        (dict(kind=7), "no kind 7"),
        (dict(itemsize=3), "elements of 3 bytes"),
        (dict(length=11), "11 bytes are no elements"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(numbers, said):
    fields = dict(format=1, kind=2, itemsize=2, relative=0, length=10) | numbers
    encoded = Encoded(sealed(struct.pack("<BBBBQ8s", *fields.values(), b"")))
    for use in (lambda: encoded.kind, lambda: encoded.apply(np.zeros(10, np.uint8))):
        with pytest.raises(CheckpointError, match=said):
            use()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (np.zeros(8, np.uint8), "a tensor of 10 bytes, not of 8"),
        (np.zeros(5, np.uint16), "not uint16 of shape"),
        (np.zeros((5, 2), np.uint8), r"not uint8 of shape \(5, 2\)"),
        (np.zeros(20, np.uint8)[::2], "with gaps"),
        (bytearray(10), "not bytearray"),
        (np.frombuffer(bytes(10), np.uint8), "read-only"),
        (np.frombuffer(bytes(8), np.uint8), "of 10 bytes, not of 8\nthe target is read-only"),
    ],
)
def test_a_target_it_does_not_fit_is_refused(target, said):
    encoded = encode(np.zeros(10, np.uint8), np.ones(10, np.uint8), 2)
    with pytest.raises(CheckpointError, match=said):
        encoded.apply(target)


@pytest.mark.parametrize(
    ("old", "new", "itemsize", "said"),
    [
        (np.zeros(8, np.uint8), np.zeros(6, np.uint8), 2, "8 bytes do not become 6"),
        (np.zeros(6, np.uint8), np.zeros(6, np.uint8), 4, "6 bytes are no multiple of"),
        (np.zeros(6, np.uint8), np.zeros(6, np.uint8), 3, "1, 2, 4 or 8 bytes, not 3"),
        ([0, 0], np.zeros(6, np.float32), 0, "(?s)old.*list.*new.*float32.*1, 2, 4 or 8"),
    ],
)
def test_tensors_that_are_no_pair_are_refused(old, new, itemsize, said):
    with pytest.raises(CheckpointError, match=said):
        encode(old, new, itemsize)
    with pytest.raises(CheckpointError, match=said):
        encode_as("blocks", old, new, itemsize)


def test_a_kind_that_there_is_not_is_refused():
    with pytest.raises(CheckpointError, match="no kind 'rows': there are whole, blocks, elements"):
        encode_as("rows", np.zeros(8, np.uint8), np.ones(8, np.uint8), 2)


# Numbers and values as bytes


@given(numbers=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 300) | st.just(0), max_size=300))
def test_any_numbers_come_back(numbers):
    numbers = np.array(numbers, np.uint64)
    source = Source(pack_numbers(numbers))
    assert np.array_equal(unpack_numbers(source, len(numbers), numbers.dtype), numbers)
    assert source.exhausted


def test_numbers_come_back_where_a_sample_of_them_misleads():
    for stride in range(2, 7):
        numbers = np.full(stride * 4096, 1 << 40, np.uint64)
        numbers[::stride] = 0
        source = Source(pack_numbers(numbers))
        assert np.array_equal(unpack_numbers(source, len(numbers), numbers.dtype), numbers)


@given(change=changes())
def test_values_come_back_from_planes_and_from_distances(change):
    old, new, itemsize = change
    before, after = (data.view(UNSIGNED[itemsize]) for data in (old, new))
    source = Source(pack_values(after))
    assert np.array_equal(unpack_values(source, len(after), after.dtype), after)
    assert np.array_equal(moved(before, distances(before, after)), after)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_distance_counts_representable_numbers(dtype):
    floats = (rng().standard_normal(1000) * 10.0 ** rng().integers(-9, 4, 1000)).astype(dtype)
    floats = np.append(floats, dtype([0.0, -0.0, 1.0, -1.0])[floats.itemsize // 8 :])
    unsigned = UNSIGNED[floats.itemsize]
    for direction, expected in ((np.inf, 2), (-np.inf, 1)):
        neighbours = np.nextafter(floats, dtype(direction))
        found = distances(floats.view(unsigned), neighbours.view(unsigned))
        assert (found[floats != 0] == expected).all()
    assert not distances(floats.view(unsigned), floats.view(unsigned)).any()
