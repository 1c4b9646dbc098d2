"""Tar files of samples, for tests: images, labels, arrays, JSON and text, written by tarfile."""

import gzip
import io
import json
import tarfile

import numpy as np
import zstandard
from PIL import Image


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def sample(number):
    """Return the parts of a sample, and the pixels of its image."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    array = io.BytesIO()
    np.save(array, np.full(3, number, np.float32))
    parts = {
        "png": png(pixels),
        "cls": str(number % 10).encode(),
        "npy": array.getvalue(),
        "json": json.dumps({"number": number}).encode(),
        "txt": f"sample {number}".encode(),
    }
    return parts, pixels


def tar_of(members):
    """Return the bytes of a tar file with the members (name, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def shard(numbers, extensions=("png", "cls", "npy", "json", "txt")):
    """Return the bytes of a shard of samples."""
    return tar_of(
        [
            (f"data/{number:05d}.{extension}", sample(number)[0][extension])
            for number in numbers
            for extension in extensions
        ]
    )


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
