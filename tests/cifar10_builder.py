"""A data set with the name and the features of CIFAR-10 and a few random images, as TFDS prepares it."""

import contextlib
import io
import sys
import tempfile
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZES = {"train": 40, "test": 20}


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Random images of 32 x 32."""

    VERSION = tfds.core.Version("3.0.2")
    name = "cifar10"

    def _info(self):
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(names=CLASSES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split):
        random = np.random.default_rng(len(split))
        for number in range(SIZES[split]):
            name, file = f"{split}_{number:05d}", io.BytesIO()  # TFDS encodes arrays with TensorFlow only
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "PNG")
            file.seek(0)
            yield name, {"id": name, "image": file, "label": number % 10}


def prepare(data_dir):
    """Prepare the data set below `data_dir`."""
    tfds.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(tempfile, "tempdir", folder))  # TFDS leaves an empty folder there
        Cifar10(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
