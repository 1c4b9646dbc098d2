"""From the parts of a WebDataset sample to an example: each extension has its decoder."""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxdist.data.sources.images import IMAGE_SUFFIXES, RGB, ImageType, decode_image
from jaxdist.data.sources.source import CorruptExample, Example

_IMAGES = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


@dataclasses.dataclass(frozen=True)
class PartsDecoder:
    """Makes an example of the parts of a sample.

    Attributes:
      fields: by field, the extensions that it may have, divided by a semicolon, `{"image": "jpg;png", "label": "cls"}`;
        None makes a field of each part, named by its extension.
      image_type: what images are decoded to; None leaves their bytes, uint8.
    """

    fields: Mapping[str, str] | None = None
    image_type: ImageType | None = RGB

    def __call__(self, name: str, parts: Mapping[str, bytes]) -> Example:
        """Return the example; CorruptExample where a part is missing or cannot be decoded; `name` is the sample's."""
        chosen = self.chosen(name, parts)
        return {field: self._decode(f"{name}.{extension}", parts[extension]) for field, extension in chosen.items()}

    def chosen(self, name: str, extensions: Any) -> dict[str, str]:
        """Return the extension of each field among those that a sample has."""
        if self.fields is None:
            return {extension: extension for extension in extensions}
        found = {}
        for field, names in self.fields.items():
            present = [extension for extension in names.split(";") if extension in extensions]
            if not present:
                raise CorruptExample(
                    f"{name} has no part {names!r} for the field {field!r}; it has {list(extensions)}."
                )
            found[field] = present[0]
        return found

    def _decode(self, name: str, content: bytes) -> Any:
        kind = name.rsplit(".", 1)[-1]
        if kind in _IMAGES:
            if self.image_type is None:
                return np.frombuffer(content, np.uint8)
            return decode_image(content, self.image_type, name=name)
        decode = _DECODERS.get(kind)
        if decode is None:
            return np.frombuffer(content, np.uint8)
        try:
            return decode(content)
        except (ValueError, OverflowError, EOFError, SyntaxError) as error:
            raise CorruptExample(f"{name} cannot be decoded: {error}") from error


def _whole_number(content: bytes) -> np.int64:
    return np.int64(int(content))


def _array(content: bytes) -> np.ndarray:
    stream = io.BytesIO(content)
    found = np.load(stream, allow_pickle=False)
    if content.startswith(b"\x93NUMPY") and stream.read(1):
        raise ValueError("it has more after the end of its array")
    return found


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(("cls", "cls2", "index", "inx", "id"), _whole_number),
    **dict.fromkeys(("txt", "text"), lambda content: content.decode()),
    "json": json.loads,
    "npy": _array,
}
"""What is done with each kind of part; of others, the bytes are the field, uint8."""
