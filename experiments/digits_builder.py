"""The digits of scikit-learn as a TFDS data set, prepared on this machine: no download, no TensorFlow.

1,797 grey images of 8 x 8 with 17 shades; four of five are for training, the others for the test.
"""

import contextlib
import fcntl
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # imported more than once, so not registered
    """Handwritten digits, 8 x 8."""

    VERSION = tfds.core.Version("1.0.0")
    name = "jaxdist_digits"

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)
        label = tfds.features.ClassLabel(num_classes=10)
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"image": image, "label": label})
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {"train": self._generate_examples(train=True), "test": self._generate_examples(train=False)}

    def _generate_examples(self, *, train: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        images, labels = load_digits(return_X_y=True)
        for number, (image, label) in enumerate(zip(images, labels)):
            if (number % 5 != 4) == train:
                yield number, {"image": image.reshape(8, 8, 1).astype(np.uint8), "label": int(label)}


def prepare(data_dir: str | os.PathLike | None = None) -> str:
    """Prepare the data set in `data_dir` unless it is there already; return the folder of its prepared version.

    The default is the folder of all TFDS data sets: $TFDS_DATA_DIR, or ~/tensorflow_datasets.
    """
    tfds.disable_progress_bar()
    builder = Digits(data_dir=data_dir and os.fspath(data_dir), file_format="array_record")
    root = pathlib.Path(builder.data_dir).parent
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "prepare.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of a run may get here at once
        with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to the run record
            builder.download_and_prepare()
    return os.fspath(builder.data_dir)
