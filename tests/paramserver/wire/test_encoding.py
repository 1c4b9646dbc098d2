"""Every message is decoded to itself, and nothing else is accepted."""

import dataclasses
import types
import typing

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.wire import encoding

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array(3.5, np.float64),
    np.zeros((0, 4), np.int32),
    np.arange(8, dtype=np.int64)[::2],
    np.array([1.5, -2.0], ml_dtypes.bfloat16),
    np.array([True, False]),
]


def example(kind, draw):
    """Return a value of the annotated type."""
    if kind in (int, float, bool, str, bytes):
        return draw({int: INTS, float: FLOATS, bool: st.booleans(), str: st.text(), bytes: st.binary()}[kind])
    if kind is np.ndarray:
        return draw(st.sampled_from(ARRAYS))
    if kind is type(None):
        return None
    if isinstance(kind, types.UnionType):
        return example(draw(st.sampled_from(typing.get_args(kind))), draw)
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        items = items[:1] * draw(st.integers(0, 2)) if items[-1] is Ellipsis else items
        return tuple(example(item, draw) for item in items)
    hints = typing.get_type_hints(kind)
    return kind(*(example(hints[field.name], draw) for field in dataclasses.fields(kind)))


INTS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False)


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("kind", encoding.KINDS)
@given(data=st.data())
def test_every_message_survives(kind, data):
    message = example(kind, data.draw)
    assert same(message, encoding.decode(encoding.to_bytes(message)))


def push(pieces):
    lease = messages.Lease(0, 0, 0, 0, 4)
    return messages.Push(0, 1, 2, 3, 4, 5, lease, 4.0, 4.0, True, 1.0, pieces)


def test_a_large_array_is_not_copied_and_arrives_aligned_where_it_stays():
    array = np.arange(encoding.SMALL_BYTES, dtype=np.float32)
    blocks = list(encoding.encode(push((array, array[:10]))))
    assert any(np.shares_memory(array, np.frombuffer(block, np.uint8)) for block in blocks)
    data = b"".join(blocks)
    filled = []
    parts, at = encoding.assemble(data[: encoding.PREFIX_BYTES]), encoding.PREFIX_BYTES
    try:
        while True:
            part = next(parts)
            part[:] = data[at : at + len(part)]
            at += len(part)
            filled.append(part)
    except StopIteration as end:
        got = end.value.pieces
    assert [np.array_equal(piece, array[: piece.size]) for piece in got] == [True, True]
    assert any(np.shares_memory(got[0], np.frombuffer(part, np.uint8)) for part in filled)
    assert all(piece.ctypes.data % 64 == 0 and not piece.flags.writeable for piece in got)


@given(position=st.integers(0), value=st.integers(1, 255))
def test_a_flipped_byte_is_noticed(position, value):
    data = bytearray(encoding.to_bytes(push((np.arange(100, dtype=np.float32),))))
    data[position % len(data)] ^= value
    with pytest.raises(encoding.EncodingError):
        encoding.decode(bytes(data))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    with pytest.raises(encoding.EncodingError):
        encoding.decode(data)


def test_values_that_cannot_be_sent_are_refused():
    with pytest.raises(encoding.EncodingError, match="dtype 'float128' cannot be sent"):
        encoding.encode(push((np.zeros(2, np.longdouble),)))
    with pytest.raises(encoding.EncodingError, match="type dict cannot be sent"):
        encoding.encode({})
    with pytest.raises(encoding.EncodingError, match="type Tick cannot be sent"):
        encoding.encode(messages.Tick())


def test_big_endian_arrays_travel_as_little_endian():
    array = np.arange(4, dtype=">f4")
    got = encoding.decode(encoding.to_bytes(push((array,)))).pieces[0]
    assert got.dtype == np.dtype("<f4")
    assert np.array_equal(got, array)


SIZES = st.lists(st.integers(0, 40_000), max_size=5)


@given(sizes=SIZES, block_bytes=st.integers(100, 200_000))
def test_blocks_are_bounded_and_hold_the_message(sizes, block_bytes):
    message = push(tuple(np.arange(size, dtype=np.float32) for size in sizes))
    encoded = encoding.encode(message, block_bytes=block_bytes)
    blocks = list(encoded)
    data = b"".join(blocks)
    assert len(data) == encoded.num_bytes
    assert all(0 < len(block) <= block_bytes for block in blocks)
    assert same(message, encoding.decode(data))
    with pytest.raises(encoding.EncodingError, match="declares"):
        encoding.decode(data[:-1])
    with pytest.raises(encoding.EncodingError, match="declares"):
        encoding.decode(data + b"x")
