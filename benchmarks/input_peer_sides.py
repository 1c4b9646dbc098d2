"""The sides of `input_peers.py`, each in a process of its own as those of `input_sides.py` are: batches of JPEGs.

All of them decode with the exact inverse transform, cut out a random 224 x 224 and mirror half of the images.
"""

import contextlib
import functools
import io
import itertools
import pathlib
import random
import sys
import tarfile
from collections.abc import Callable, Iterator

import input_sides
import numpy as np
from input_sides import BATCH_SIZE, CROP, list_jpegs


def decode_augment(content: bytes) -> np.ndarray:
    import simplejpeg

    image = simplejpeg.decode_jpeg(content)
    top, left = random.randrange(image.shape[0] - CROP + 1), random.randrange(image.shape[1] - CROP + 1)
    image = image[top : top + CROP, left : left + CROP]
    if random.random() < 0.5:
        return image
    mirrored = np.empty(image.shape, image.dtype)
    for channel in range(3):  # five times as fast as all channels in one go
        mirrored[..., channel] = image[:, ::-1, channel]
    return mirrored


def read_augment(item: tuple[str, int]) -> tuple[np.ndarray, int]:
    return decode_augment(pathlib.Path(item[0]).read_bytes()), item[1]


def counted(batches: Iterator) -> Iterator[int]:
    """Yield the sizes of batches whose first part is their images."""
    for images, _ in batches:
        assert images.shape == (BATCH_SIZE, CROP, CROP, 3), images.shape
        yield BATCH_SIZE


def stacked(items: list) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*items)
    return np.stack(images), np.asarray(labels)


def ours(source, **settings) -> Iterator[int]:
    from jaxdist.data import DecodeCropFlip, Loader

    loader = Loader(source, global_batch_size=BATCH_SIZE, seed=0, example_fn=DecodeCropFlip(CROP, CROP), **settings)
    return counted((batch["image"], batch["label"]) for batch, _ in loader)


def ours_files(folder: pathlib.Path, **settings) -> Iterator[int]:
    from jaxdist.data import ImageFolder

    return ours(ImageFolder(folder / "jpeg", decode=False), **settings)


def ours_shards(folder: pathlib.Path, **settings) -> Iterator[int]:
    from jaxdist.data import TarSource

    fields = {"image": "jpg", "label": "cls"}
    return ours(TarSource(folder / "tar", fields=fields, image_type=None), **settings)


def ours_stream(folder: pathlib.Path, **settings) -> Iterator[int]:
    from jaxdist.data import tar_stream

    fields, sizes = {"image": "jpg", "label": "cls"}, (256,) * 4
    return ours(tar_stream(folder / "tar", fields=fields, image_type=None, sizes=sizes), **settings)


def webdataset_shards(folder: pathlib.Path) -> Iterator[int]:
    import webdataset

    shards = sorted(map(str, (folder / "tar").glob("*.tar")))
    data = webdataset.WebDataset(shards, shardshuffle=False, resampled=True, nodesplitter=None)
    data = data.shuffle(1000).to_tuple("jpg", "cls").map_tuple(decode_augment, int).batched(BATCH_SIZE)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=2, persistent_workers=True)
    return counted((np.asarray(images), labels) for images, labels in loader)


def litdata_shards(folder: pathlib.Path) -> Iterator[int]:
    import litdata

    chunks = folder / "litdata"
    if not chunks.exists():
        items = list(zip(*list_jpegs(folder)))
        # Numbers: paths it would copy first, in two more processes, which import torch before they start.
        numbers = list(range(len(items)))
        with contextlib.redirect_stdout(sys.stderr):  # answers alone go to the standard output
            litdata.optimize(
                functools.partial(sample_of, items), numbers, str(chunks), chunk_bytes="8MB", num_workers=1
            )

    data = litdata.StreamingDataset(str(chunks), transform=decode_sample, shuffle=True, drop_last=True, seed=0)
    loader = litdata.StreamingDataLoader(data, batch_size=BATCH_SIZE, num_workers=2, persistent_workers=True)
    return counted((images.numpy(), labels) for _ in itertools.count() for images, labels in loader)


def decode_sample(sample: tuple[bytes, int]) -> tuple[np.ndarray, int]:
    return decode_augment(sample[0]), sample[1]


def sample_of(items: list[tuple[str, int]], number: int) -> tuple[bytes, int]:
    path, label = items[number]
    return pathlib.Path(path).read_bytes(), label


def spdl_batches(items: Iterator, read: Callable) -> Iterator[int]:
    from spdl.pipeline import PipelineBuilder

    builder = PipelineBuilder().add_source(items).pipe(read, concurrency=2).aggregate(BATCH_SIZE)
    pipeline = builder.pipe(stacked).add_sink(3).build(num_threads=3, max_failures=0)
    with pipeline.auto_stop():
        yield from counted(iter(pipeline))


def shuffled(items: list) -> Iterator:
    """Yield the items again and again, in another order each time."""
    while True:
        yield from random.sample(items, len(items))


def spdl_files(folder: pathlib.Path) -> Iterator[int]:
    return spdl_batches(shuffled(list(zip(*list_jpegs(folder)))), read_augment)


def spdl_shards(folder: pathlib.Path) -> Iterator[int]:
    """Tar files read by Python: the reader of SPDL, like its decoders, needs the libraries of FFmpeg."""

    def samples() -> Iterator[tuple[bytes, int]]:
        for shard in shuffled(sorted((folder / "tar").glob("*.tar"))):
            with tarfile.open(shard) as archive:
                contents = [archive.extractfile(member).read() for member in archive]
            window = list(zip(contents[::2], map(int, contents[1::2])))
            random.shuffle(window)
            yield from window

    return spdl_batches(samples(), lambda item: (decode_augment(item[0]), item[1]))


def tf_data(content, labels_of: Callable) -> Iterator[int]:
    import tensorflow as tf

    def load(item):
        encoded, label = labels_of(item)
        image = tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")
        image = tf.image.random_crop(image, (CROP, CROP, 3))
        return tf.image.random_flip_left_right(image), label

    data = content.repeat().map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH_SIZE)
    return counted(data.prefetch(tf.data.AUTOTUNE).as_numpy_iterator())


def tf_data_files(folder: pathlib.Path) -> Iterator[int]:
    import tensorflow as tf

    paths, labels = list_jpegs(folder)
    data = tf.data.Dataset.from_tensor_slices({"path": paths, "label": labels}).shuffle(len(paths))
    return tf_data(data, lambda item: (tf.io.read_file(item["path"]), item["label"]))


def tf_data_shards(folder: pathlib.Path) -> Iterator[int]:
    """From TFRecord files with the same samples, since tf.data reads no tar files."""
    import tensorflow as tf

    shards = [str(folder / "tfrecord" / f"{number}.tfrecord") for number in range(4)]
    if not pathlib.Path(shards[0]).exists():
        write_tfrecords(folder, shards)
    fields = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}

    def parse(record):
        found = tf.io.parse_single_example(record, fields)
        return found["image"], found["label"]

    data = tf.data.Dataset.from_tensor_slices(shards).shuffle(4)
    return tf_data(data.interleave(tf.data.TFRecordDataset, cycle_length=4).shuffle(1000), parse)


def write_tfrecords(folder: pathlib.Path, shards: list[str]) -> None:
    import tensorflow as tf

    pathlib.Path(shards[0]).parent.mkdir()
    samples = list(zip(*list_jpegs(folder)))
    for number, shard in enumerate(shards):
        with tf.io.TFRecordWriter(shard) as writer:
            for path, label in samples[number :: len(shards)]:
                content = tf.train.Feature(bytes_list=tf.train.BytesList(value=[pathlib.Path(path).read_bytes()]))
                found = {"image": content, "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))}
                writer.write(tf.train.Example(features=tf.train.Features(feature=found)).SerializeToString())


def write_tars(folder: pathlib.Path, num_shards: int = 4) -> None:
    """Write the JPEGs of a folder as WebDataset shards beside it."""
    (folder / "tar").mkdir()
    samples = list(zip(*list_jpegs(folder)))
    for number in range(num_shards):
        with tarfile.open(folder / "tar" / f"{number}.tar", "w") as archive:
            for place, (path, label) in enumerate(samples[number::num_shards]):
                for kind, content in (("jpg", pathlib.Path(path).read_bytes()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{place:06d}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


WORKERS, THREADS = {"num_workers": 2, "num_threads": 0, "read_ahead": 1}, {"num_threads": 2, "read_ahead": 1}

SIDES: dict[str, Callable[[pathlib.Path], Iterator[int]]] = {
    "ours files": lambda folder: ours_files(folder, **WORKERS),
    "ours files, 2 threads": lambda folder: ours_files(folder, **THREADS),
    "SPDL files": spdl_files,
    "tf.data files": tf_data_files,
    "ours shards": lambda folder: ours_shards(folder, **WORKERS),
    "ours shards, 2 threads": lambda folder: ours_shards(folder, **THREADS),
    "ours shards, read forward": lambda folder: ours_stream(folder, **THREADS),
    "WebDataset shards": webdataset_shards,
    "LitData shards": litdata_shards,
    "SPDL shards": spdl_shards,
    "tf.data shards": tf_data_shards,
}

if __name__ == "__main__":
    input_sides.SIDES.update(SIDES)
    input_sides.serve(sys.argv[1], pathlib.Path(sys.argv[2]))
