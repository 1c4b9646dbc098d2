"""What a file is by its first bytes, for messages about one that was given for another kind."""

_KINDS = (
    (b"PK\x03\x04", "a ZIP archive, as Excel workbooks (.xlsx) and .npz files are"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook (.xls)"),
    (b"\x1f\x8b", "compressed by gzip (.gz)"),
    (b"BZh", "compressed by bzip2 (.bz2)"),
    (b"\xfd7zXZ\x00", "compressed by xz (.xz)"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard (.zst)"),
    (b"PAR1", "a Parquet file (data.ParquetSource reads it)"),
    (b"ARROW1", "an Arrow or Feather file"),
    (b"FEA1", "a Feather file"),
    (b"ORC", "an ORC file"),
    (b"\x93NUMPY", "a .npy file (data.NpySource reads it)"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"SQLite format 3\x00", "an SQLite database"),
    *((b"\x80" + bytes([version]), "a pickle, which runs the code in it") for version in range(2, 6)),
)


def kind_of(head: bytes) -> str | None:
    """Return what a file that begins so is, as a noun or a participle; None where its bytes do not say."""
    return next((kind for mark, kind in _KINDS if head.startswith(mark)), None)


def check_kind(path: str, head: bytes, *, wanted: str, do: str) -> None:
    """Raise ValueError where a file begins as one of another kind than `wanted`; `do` says what to do."""
    if (kind := kind_of(head)) is not None:
        raise ValueError(f"{path} is to be {wanted}, and it is {kind}. {do}")
