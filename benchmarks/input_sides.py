"""One side of the input benchmark in a process of its own: an endless stream of batches, read on request.

`input.py` starts it as `python input_sides.py SIDE DATA_DIR`, each side in the environment that has its package, and
writes a number of batches to its standard input; the answer is one JSON object a line. Half as many batches are read
before, untimed.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

BATCH_SIZE, CROP, WINDOW = 64, 224, 1024
READ_AHEAD_SECONDS = 0.5


def ours_jpeg(folder: pathlib.Path, num_threads: int, num_workers: int) -> Iterator[int]:
    from jaxdist.data import DecodeCropFlip, ImageFolder, Loader

    source, augment = ImageFolder(folder / "jpeg", decode=False), DecodeCropFlip(CROP, CROP)
    settings = {"num_threads": num_threads, "num_workers": num_workers, "read_ahead": 1}
    for batch, _ in Loader(source, global_batch_size=BATCH_SIZE, seed=0, example_fn=augment, **settings):
        assert batch["image"].shape == (BATCH_SIZE, CROP, CROP, 3)
        yield BATCH_SIZE


def tf_data_jpeg(folder: pathlib.Path) -> Iterator[int]:
    import tensorflow as tf

    paths, labels = list_jpegs(folder)

    def load(path: tf.Tensor, label: tf.Tensor) -> tuple:
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3, dct_method="INTEGER_ACCURATE")
        image = tf.image.random_crop(image, (CROP, CROP, 3))
        return tf.image.random_flip_left_right(image), label

    data = tf.data.Dataset.from_tensor_slices((paths, labels)).shuffle(len(paths)).repeat()
    data = data.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH_SIZE).prefetch(tf.data.AUTOTUNE)
    for image, _ in data.as_numpy_iterator():
        assert image.shape == (BATCH_SIZE, CROP, CROP, 3)
        yield BATCH_SIZE


def decode_augment(path: str, random) -> "numpy.ndarray":  # noqa: F821
    """The decoder that ours uses, crop and flip, for the sides that have none of their own."""
    import numpy as np
    import simplejpeg

    image = simplejpeg.decode_jpeg(pathlib.Path(path).read_bytes())
    top, left = random.integers(0, image.shape[0] - CROP + 1), random.integers(0, image.shape[1] - CROP + 1)
    image = image[top : top + CROP, left : left + CROP]
    if random.integers(2):
        # Channel by channel, as numpy copies a mirrored image of three channels five times as slowly in one go.
        mirrored = np.empty(image.shape, image.dtype)
        for channel in range(3):
            mirrored[..., channel] = image[:, ::-1, channel]
        return mirrored
    return image


def torch_jpeg(folder: pathlib.Path) -> Iterator[int]:
    import numpy as np
    import torch

    paths, labels = list_jpegs(folder)

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> tuple:
            image = decode_augment(paths[index], np.random.default_rng(int(torch.randint(2**31, ()))))
            return torch.from_numpy(np.ascontiguousarray(image)), labels[index]

    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        Images(), BATCH_SIZE, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True
    )
    while True:
        for image, _ in loader:
            assert image.shape == (BATCH_SIZE, CROP, CROP, 3)
            yield BATCH_SIZE


def grain_jpeg(folder: pathlib.Path, num_threads: int, num_workers: int, whole_batches: bool) -> Iterator[int]:
    """`whole_batches`: a thread makes a whole batch, instead of one element of it."""
    import grain

    paths, labels = list_jpegs(folder)
    data = grain.MapDataset.source(list(zip(paths, labels))).seed(0).shuffle().repeat()
    data = data.random_map(lambda item, random: (decode_augment(item[0], random), item[1]))
    if whole_batches:
        data = data.batch(BATCH_SIZE).to_iter_dataset(grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads))
    else:
        data = data.to_iter_dataset(grain.ReadOptions(num_threads, prefetch_buffer_size=3 * BATCH_SIZE))
        data = data.batch(BATCH_SIZE)
    if num_workers:
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    for image, _ in data:
        assert image.shape == (BATCH_SIZE, CROP, CROP, 3)
        yield BATCH_SIZE


def ours_tokens(folder: pathlib.Path) -> Iterator[int]:
    from jaxdist.data import Loader, TokenSource

    for batch, _ in Loader(TokenSource(folder / "tokens", length=WINDOW), global_batch_size=BATCH_SIZE, seed=0):
        assert batch["tokens"].shape == (BATCH_SIZE, WINDOW)
        yield BATCH_SIZE * WINDOW


def torch_tokens(folder: pathlib.Path) -> Iterator[int]:
    import numpy as np
    import torch

    tokens = np.load(folder / "tokens" / "tokens.npy", mmap_mode="r")
    windows = tokens.reshape(-1, WINDOW)

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(windows)

        def __getitems__(self, ids: list[int]) -> torch.Tensor:
            return torch.from_numpy(windows.take(ids, axis=0).astype(np.int32))

    loader = torch.utils.data.DataLoader(Windows(), BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=lambda x: x)
    while True:
        for batch in loader:
            assert batch.shape == (BATCH_SIZE, WINDOW)
            yield BATCH_SIZE * WINDOW


def grain_tokens(folder: pathlib.Path) -> Iterator[int]:
    import grain
    import numpy as np

    windows = np.load(folder / "tokens" / "tokens.npy", mmap_mode="r").reshape(-1, WINDOW)
    data = (
        grain.MapDataset.source(windows)
        .shuffle(seed=0)
        .repeat()
        .map(lambda row: row.astype(np.int32))
        .batch(BATCH_SIZE)
    )
    for batch in data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=128)):
        assert batch.shape == (BATCH_SIZE, WINDOW)
        yield BATCH_SIZE * WINDOW


def ours_elements(folder: pathlib.Path) -> Iterator[int]:
    import numpy as np

    from jaxdist.data import ArraySource, Loader

    images, labels = (np.load(folder / "elements" / f"{name}.npy") for name in ("images", "labels"))
    for batch, _ in Loader(ArraySource({"image": images, "label": labels}), global_batch_size=BATCH_SIZE, seed=0):
        assert batch["image"].shape == (BATCH_SIZE, 28, 28)
        yield BATCH_SIZE


def torch_elements(folder: pathlib.Path) -> Iterator[int]:
    import numpy as np
    import torch

    images, labels = (torch.from_numpy(np.load(folder / "elements" / f"{name}.npy")) for name in ("images", "labels"))
    torch.set_num_threads(1)
    data = torch.utils.data.TensorDataset(images, labels)
    loader = torch.utils.data.DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True)
    while True:
        for image, _ in loader:
            assert image.shape == (BATCH_SIZE, 28, 28)
            yield BATCH_SIZE


SIDES: dict[str, Callable[[pathlib.Path], Iterator[int]]] = {
    "ours jpeg": lambda folder: ours_jpeg(folder, 0, 2),
    "ours jpeg, 2 threads": lambda folder: ours_jpeg(folder, 2, 0),
    "tf.data jpeg": tf_data_jpeg,
    "torch jpeg": torch_jpeg,
    "grain jpeg, 2 threads": lambda folder: grain_jpeg(folder, 2, 0, False),
    "grain jpeg, 16 threads": lambda folder: grain_jpeg(folder, 16, 0, False),
    "grain jpeg, 2 threads of batches": lambda folder: grain_jpeg(folder, 2, 0, True),
    "grain jpeg, 16 threads of batches": lambda folder: grain_jpeg(folder, 16, 0, True),
    "grain jpeg, 2 workers": lambda folder: grain_jpeg(folder, 1, 2, False),
    "ours tokens": ours_tokens,
    "torch tokens": torch_tokens,
    "grain tokens": grain_tokens,
    "ours elements": ours_elements,
    "torch elements": torch_elements,
}


def list_jpegs(folder: pathlib.Path) -> tuple[list[str], list[int]]:
    paths = sorted(map(str, (folder / "jpeg").rglob("*.jpg")))
    return paths, [int(pathlib.Path(path).parent.name) for path in paths]


def processes() -> list[int]:
    """Return the ids of this process and of its descendants."""
    found, parents = [os.getpid()], {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(entry)] = int(pathlib.Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def cpu_seconds() -> float:
    ticks = 0
    for pid in processes():
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mb(*kinds: str) -> float:
    """Return the proportional set size of all processes: memory they share is counted once."""
    kilobytes = 0
    for pid in processes():
        lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith(kinds))
    return kilobytes / 1024


def serve(side: str, folder: pathlib.Path) -> None:
    batches = SIDES[side](folder)
    for line in sys.stdin:
        num_batches = int(line)
        # Batches read ahead before the clock starts must not count as read now: start with none of them left.
        for _ in range(num_batches // 2):
            next(batches)
        cpu, start = cpu_seconds(), time.perf_counter()
        units = sum(next(batches) for _ in range(num_batches))
        seconds = time.perf_counter() - start
        answer = {"units": units, "seconds": seconds, "cpu": cpu_seconds() - cpu}
        time.sleep(READ_AHEAD_SECONDS)  # the memory that counts is that of a pipeline which has read ahead
        answer |= {"memory_mb": memory_mb("Pss:"), "written_mb": memory_mb("Pss_Anon:", "Pss_Shmem:")}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], pathlib.Path(sys.argv[2]))
