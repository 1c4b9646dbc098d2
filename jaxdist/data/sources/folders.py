"""Folders of images by class: `root/CLASS/FILE`; and files of which no class is known."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from jaxdist.data.fingerprints import FileList, fingerprint_files
from jaxdist.data.sources.images import (
    IMAGE_SUFFIXES,
    UNREAD_IMAGE_SUFFIXES,
    ImageType,
    decode_image,
    require_decoders,
)
from jaxdist.data.sources.listing import list_all, list_by_class, read_file
from jaxdist.data.sources.source import Example, checked_index


class ImageFolder:
    """Images by class: `image` (height, width, channels), `label` int32. JPEG, PNG and what else Pillow reads.

    >>> train = ImageFolder("train/")
    >>> held_out = ImageFolder("val/", classes=train.classes)

    Images differ in size; bring them to one in `example_fn` (see `transforms`).

    Args:
      root: the folder of the classes' folders.
      decode: False leaves `image` as the file's bytes, uint8 (bytes,); see `transforms.DecodeImage`.
      classes: the names of the classes by number, those of the training data for example; None takes the folders' names
        in alphabetical order.
      channels, dtype, orient, deep, frames: what images are decoded to, see `images.ImageType`: uint8 RGB by default,
        the EXIF orientation applied; images of more than 8 bits are refused where the dtype cannot hold them, and
        animations and files of several pages.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        decode: bool = True,
        classes: Sequence[str] | None = None,
        channels: Literal[1, 3, 4] = 3,
        dtype: Literal["uint8", "uint16", "float32"] = "uint8",
        orient: bool = True,
        deep: Literal["refuse", "scale"] = "refuse",
        frames: Literal["refuse", "first"] = "refuse",
    ):
        if decode:
            require_decoders()
        self._type = ImageType(channels, dtype, orient, deep, frames) if decode else None
        self.classes, found, self._labels = list_by_class(root, IMAGE_SUFFIXES, classes, unread=UNREAD_IMAGE_SUFFIXES)
        self.files = FileList(found, root)
        self.vocabulary = {"label": self.classes}
        self._fingerprint: str | None = None

    def elsewhere(self, root: str | os.PathLike, classes: Sequence[str] | None) -> "ImageFolder":
        """Return the images of another folder, read as these are."""
        settings = {"decode": False} if self._type is None else dataclasses.asdict(self._type)
        return ImageFolder(root, classes=classes, **settings)

    def unlabelled(self, root: str | os.PathLike) -> "UnlabelledFiles":
        """Return an image file, or the images of a folder and of those below it, read as these are."""
        return unlabelled_images(root, self._type)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        index = checked_index(index, len(self))
        return {**_read_image(self.files[index], self._type), "label": np.int32(self._labels[index])}

    def location(self, index: int) -> str:
        """Return the file of an example."""
        return self.files[index]

    def fingerprint(self) -> str:
        """Return the hash of the settings, the classes, and the files' names, sizes and contents (in samples)."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_files("images", self.files, self._type, *self.classes)
        return self._fingerprint


def unlabelled_images(root: str | os.PathLike, image_type: ImageType | None) -> "UnlabelledFiles":
    """Return an image file, or the images of a folder and of those below it; None leaves them encoded."""
    return UnlabelledFiles(
        root, IMAGE_SUFFIXES, unread=UNREAD_IMAGE_SUFFIXES, read=functools.partial(_read_image, image_type=image_type)
    )


def _read_image(path: str, image_type: ImageType | None) -> Example:
    data = read_file(path)
    return {"image": np.frombuffer(data, np.uint8) if image_type is None else decode_image(data, image_type, name=path)}


class UnlabelledFiles:
    """Images or sounds to predict of: what `read(path)` returns, and `label` int32, which is -1: no class.

    An `example_fn` that hands the label on reads them as it reads the training data.

    Args:
      root: a file, or a folder: its files with one of the suffixes, and those of the folders below it.
      suffixes: in lower case.
      unread: suffixes of files that belong to the data and cannot be read.
      read: returns the other fields of a file; raises CorruptExample.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        suffixes: Sequence[str],
        *,
        unread: Sequence[str],
        read: Callable[[str], Example],
    ):
        self.files, self._read = FileList(list_all(root, suffixes, unread=unread)), read

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        return {**self._read(self.location(checked_index(index, len(self)))), "label": np.int32(-1)}

    def location(self, index: int) -> str:
        """Return the file of an example."""
        return self.files[index]

    def fingerprint(self) -> str:
        """Return the hash of the files' sizes and contents (in samples)."""
        return fingerprint_files("unlabelled", self.files)
