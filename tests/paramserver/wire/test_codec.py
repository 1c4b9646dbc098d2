"""Values of annotated types are read as they were written, from however many blocks, and nothing else is accepted."""

import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.paramserver.wire.codec import Decoder, Encoder, EncodingError, checksum, codec

INT = st.integers(-(2**63), 2**63 - 1)


@dataclasses.dataclass(frozen=True)
class Record:
    number: int
    names: tuple[str, ...]
    pair: tuple[int, float]
    maybe: bytes | None


RECORDS = st.builds(
    Record,
    number=INT,
    names=st.lists(st.text()).map(tuple),
    pair=st.tuples(INT, st.floats(allow_nan=False)),
    maybe=st.none() | st.binary(),
)


def written(kind, value):
    writer = Encoder()
    codec(kind)[0](writer, value)
    return writer


def read(kind, head, arrays=b""):
    reader = Decoder(bytes(head), len(arrays))
    value = codec(kind)[1](reader)
    for array in reader.arrays:
        size = array.nbytes
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(arrays[:size], np.uint8)
        arrays = arrays[size:]
    return value


@given(RECORDS)
def test_a_record_is_read_as_it_was_written(record):
    assert read(Record, written(Record, record).head) == record


@given(RECORDS, st.floats(0, 1, exclude_max=True))
def test_a_head_that_ends_early_is_refused(record, part):
    head = written(Record, record).head
    with pytest.raises(EncodingError):
        read(Record, head[: int(part * len(head))])


@given(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(["<f4", ">f4", "<i8", "|b1", "<f2"]))
def test_an_array_of_any_layout_keeps_its_values(shape, dtype):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    for view in (array, array.T):
        writer = written(np.ndarray, view)
        got = read(np.ndarray, writer.head, b"".join(writer.arrays))
        assert (got.dtype, got.shape) == (view.dtype.newbyteorder("<"), view.shape)
        assert np.array_equal(got, view)


def test_the_checksum_is_crc_32c():
    """0xe3069283 is the check value that RFC 3720 and the CRC catalogues give for the digits 1 to 9."""
    assert checksum([b"123456789"]) == checksum([memoryview(b"1234"), b"", b"56789"]) == 0xE3069283
    assert checksum([b"6789"], checksum([b"12345"])) == 0xE3069283


ARRAY = written(np.ndarray, np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("kind", "head", "arrays"),
    [
        (int | None, b"\x02", b""),
        (tuple[type(None), ...], struct.pack("<I", 1000), b""),  # items that take no bytes
        (str, struct.pack("<I", 1) + b"\xff", b""),
        (np.ndarray, ARRAY.head, b"\0" * 7),
        (np.ndarray, ARRAY.head.replace(b"float32", b"complex"), b"\0" * 8),
        (np.ndarray, ARRAY.head[:-8] + struct.pack("<q", -1), b"\0" * 8),
    ],
    ids=["alternative", "list", "name", "array", "dtype", "negative"],
)
def test_what_does_not_fit_is_refused(kind, head, arrays):
    with pytest.raises(EncodingError):
        read(kind, head, arrays)


def test_a_value_or_a_type_that_has_no_encoding_is_refused():
    with pytest.raises(EncodingError, match="str"):
        written(int | None, "text")
    with pytest.raises(TypeError, match="list"):
        codec(list[int])
