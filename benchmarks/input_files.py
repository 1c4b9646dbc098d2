"""Files to examples beside Grain: TFDS images, Parquet rows and lists, sounds; short evaluations; large folders.

python benchmarks/input_files.py [--json] [--repeats N] [--only WORK...] [--peers PYTHON] [--files N]

Each side runs in processes of its own, which take turns; medians of CPU seconds, those of all its processes, and of
seconds are compared. PYTHON is an interpreter with grain, tensorflow-datasets, pyarrow, soundfile and scipy; without
one, the rows of the others say so.
"""

import argparse
import io
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import input_sides
import numpy as np

NUM_TFDS, NUM_ROWS, NUM_READ, NUM_WAVS, BATCH_SIZE = 2_000, 200_000, 20_000, 256, 64
WORKS = {
    "tfds": ("TFDS 28x28 PNG", "us an example", ["ours tfds", "grain tfds"], 0.25),
    "parquet": ("Parquet rows of 8 columns, default order", "us a row", ["ours parquet", "grain parquet"], 1.0),
    "lists": ("Parquet lists of 8, default order", "us a row", ["ours lists", "grain lists"], 1.0),
    "small cache": (
        "Parquet rows, a cache of a quarter of them",
        "us a row",
        ["ours small cache", "grain parquet"],
        1.0,
    ),
    "wav": ("WAV -> spectrogram", "us a sound", ["ours wav", "grain wav"], 1.0),
    "wav tf.data": ("WAV -> spectrogram, beside tf.data", "us a sound", ["ours wav", "tf.data wav"], 1.0),
    "wav workers": (
        "WAV -> spectrogram, two workers / threads",
        "us a sound",
        ["ours wav, 2 workers", "ours wav"],
        None,
    ),
    "evaluation": ("evaluation of 12 pictures, two workers, five times", "s", ["ours evaluation"], None),
    "folder": ("image folder, start: list and fingerprint", "us a file", ["ours folder", "ours folder again"], None),
}
"""Name, unit, our side and theirs, and the ratio of CPU seconds that is demanded."""


def make_data(folder: pathlib.Path, works: list[str], num_files: int) -> None:
    """Write what the works read."""
    random = np.random.default_rng(0)
    if {"parquet", "lists", "small cache"} & set(works):
        make_tables(folder, random)
    if any(work.startswith("wav") for work in works):
        import soundfile

        for number in range(NUM_WAVS):
            path = folder / "wav" / str(number % 4) / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, random.normal(0, 0.1, 16_000).clip(-1, 1), 16_000, subtype="PCM_16")
    if "tfds" in works:
        make_tfds(folder / "tfds", random)
    if "evaluation" in works:
        make_pictures(folder / "evaluation", 12)
    if "folder" in works:
        make_pictures(folder / "folder", num_files)


def make_tables(folder: pathlib.Path, random: np.random.Generator) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = random.random((NUM_ROWS, 8))
    table = pa.table({f"c{number}": values[:, number] for number in range(8)})
    pq.write_table(table, folder / "t.parquet", row_group_size=10_000)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float32).reshape(-1)), 8)
    pq.write_table(pa.table({"x": lists.cast(pa.list_(pa.float32()))}), folder / "lists.parquet", row_group_size=10_000)


def make_tfds(folder: pathlib.Path, random: np.random.Generator) -> None:
    import tensorflow_datasets as tfds

    class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "benchmark_pictures"

        def _info(self):
            image = tfds.features.Image(shape=(28, 28, 1), encoding_format="png")
            features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=10)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(NUM_TFDS):
                yield number, {"image": io.BytesIO(picture(random.normal(60, 60, (28, 28)))), "label": number % 10}

    tfds.disable_progress_bar()
    builder = Pictures(data_dir=os.fspath(folder), file_format="array_record")
    builder.download_and_prepare()
    (folder / "path").write_text(os.fspath(builder.data_dir))


def picture(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "png")
    return file.getvalue()


def make_pictures(folder: pathlib.Path, count: int) -> None:
    data = picture(np.arange(64.0).reshape(8, 8))
    for number in range(count):
        path = folder / f"{number % 100 if count > 100 else number % 2:02d}" / f"{number:07d}.png"
        if number < 100:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data + number.to_bytes(4, "little"))


def ours_batches(source, num_examples: int, **settings) -> Callable[[], int]:
    from jaxdist.data import Loader

    batches = iter(Loader(source, global_batch_size=BATCH_SIZE, seed=0, **settings))
    return lambda: sum(len(next(batches).batch["mask"]) for _ in range(num_examples // BATCH_SIZE))


def ours_tfds(folder: pathlib.Path) -> Callable[[], int]:
    from jaxdist.data import TfdsSource

    source = TfdsSource((folder / "tfds" / "path").read_text(), split="train")
    return ours_batches(source, NUM_TFDS)


def grain_batches(source, num_examples: int, transform=None) -> Callable[[], int]:
    import grain

    data = grain.MapDataset.source(source).seed(0).shuffle().repeat()
    data = data if transform is None else data.map(transform)
    batches = iter(data.batch(BATCH_SIZE).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)))
    return lambda: sum(bool(next(batches) is not None) * BATCH_SIZE for _ in range(num_examples // BATCH_SIZE))


def grain_tfds(folder: pathlib.Path) -> Callable[[], int]:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory((folder / "tfds" / "path").read_text()).as_data_source("train")
    return grain_batches(source, NUM_TFDS)


def ours_parquet(folder: pathlib.Path, name: str, **settings) -> Callable[[], int]:
    from jaxdist.data import ParquetSource

    source = ParquetSource(folder / name, **settings)
    return ours_batches(source, NUM_READ)


def grain_parquet(folder: pathlib.Path, name: str) -> Callable[[], int]:
    """Grain's own Parquet reader, which reads files in their order."""
    import grain

    def read() -> int:
        rows = grain.experimental.ParquetIterDataset(os.fspath(folder / name))
        count = 0
        for _ in rows.batch(BATCH_SIZE):
            count += BATCH_SIZE
            if count >= NUM_READ:
                break
        return count

    return read


def ours_wav(folder: pathlib.Path, **settings) -> Callable[[], int]:
    from jaxdist.data import SoundFolder, transforms

    source = SoundFolder(folder / "wav", num_samples=16_000, sample_rate=16_000)
    return ours_batches(source, 8 * NUM_WAVS, example_fn=transforms.Spectrogram(), **settings)


def grain_wav(folder: pathlib.Path) -> Callable[[], int]:
    import scipy.fft
    import soundfile

    paths = sorted(map(str, (folder / "wav").rglob("*.wav")))
    window = np.hanning(400).astype(np.float32)

    def load(path: str) -> np.ndarray:
        audio, _ = soundfile.read(path, dtype="float32")
        frames = np.lib.stride_tricks.sliding_window_view(audio, 400)[::160]
        waves = scipy.fft.rfft(frames * window)
        return np.log(waves.real**2 + waves.imag**2 + np.float32(1e-10))

    return grain_batches(paths, 8 * NUM_WAVS, load)


def tf_data_wav(folder: pathlib.Path) -> Callable[[], int]:
    import tensorflow as tf

    paths = sorted(map(str, (folder / "wav").rglob("*.wav")))
    window = np.hanning(400).astype(np.float32)

    def load(path: tf.Tensor) -> tf.Tensor:
        audio, _ = tf.audio.decode_wav(tf.io.read_file(path), desired_channels=1)
        waves = tf.signal.stft(audio[:, 0], 400, 160, fft_length=400, window_fn=lambda *_, **__: window)
        return tf.math.log(tf.math.real(waves) ** 2 + tf.math.imag(waves) ** 2 + 1e-10)

    data = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat(8)
    batches = data.map(load, num_parallel_calls=2).batch(BATCH_SIZE).prefetch(2)

    def read() -> int:
        return sum(len(batch) for batch in batches.as_numpy_iterator())

    return read


def ours_evaluation(folder: pathlib.Path) -> Callable[[], int]:
    from jaxdist.data import ImageFolder, Loader

    loader = Loader(
        ImageFolder(folder / "evaluation"), global_batch_size=4, seed=0, shuffle=False, num_epochs=1, num_workers=2
    )

    def read() -> int:
        for _ in range(5):
            assert sum(batch["mask"].sum() for batch, _ in loader) == 12
        loader.close()
        return 1

    return read


def ours_folder(folder: pathlib.Path) -> Callable[[], int]:
    from jaxdist.data import ImageFolder

    def start() -> int:
        source = ImageFolder(folder / "folder", decode=False)
        assert source.fingerprint()
        return len(source)

    return start


SIDES: dict[str, Callable[[pathlib.Path], Callable[[], int]]] = {
    "ours tfds": ours_tfds,
    "grain tfds": grain_tfds,
    "ours parquet": lambda folder: ours_parquet(folder, "t.parquet"),
    "ours small cache": lambda folder: ours_parquet(folder, "t.parquet", cache_bytes=NUM_ROWS * 8 * 8 // 4),
    "grain parquet": lambda folder: grain_parquet(folder, "t.parquet"),
    "ours lists": lambda folder: ours_parquet(folder, "lists.parquet"),
    "grain lists": lambda folder: grain_parquet(folder, "lists.parquet"),
    "ours wav": ours_wav,
    "ours wav, 2 workers": lambda folder: ours_wav(folder, num_workers=2),
    "grain wav": grain_wav,
    "tf.data wav": tf_data_wav,
    "ours evaluation": ours_evaluation,
    "ours folder": ours_folder,
    "ours folder again": ours_folder,
}


def cpu_seconds() -> float:
    """Return the CPU seconds of this process, its descendants, and those of its children that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return input_sides.cpu_seconds() + ended.ru_utime + ended.ru_stime


def peak_megabytes() -> float:
    """Return the peak of this process's memory: not `ru_maxrss`, which begins with that of the parent."""
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def run_side(name: str, folder: pathlib.Path) -> None:
    """Run a side once after a warm-up, except where the first time is what is measured; print what it took."""
    work = SIDES[name](folder)
    if name not in ("ours evaluation", "ours folder", "ours folder again"):
        work()
    cpu, start = cpu_seconds(), time.perf_counter()
    units = work()
    seconds, used = time.perf_counter() - start, cpu_seconds() - cpu
    print(json.dumps({"units": units, "seconds": seconds, "cpu": used, "memory_mb": peak_megabytes()}))


def turn(python: str, name: str, folder: pathlib.Path, cache: pathlib.Path) -> dict | None:
    """Run a side in a process of its own; None where its packages are missing."""
    if name == "ours folder":
        for path in cache.rglob("*.json"):
            path.unlink()
    command = [python, __file__, "--side", name, os.fspath(folder)]
    environment = {**os.environ, "XDG_CACHE_HOME": os.fspath(cache)}
    made = subprocess.run(command, capture_output=True, text=True, env=environment)
    if made.returncode and "ModuleNotFoundError" in made.stderr:
        return None
    if made.returncode:
        raise RuntimeError(f"{name} failed:\n{made.stderr[-2000:]}")
    return json.loads(made.stdout.splitlines()[-1])


def compare(work: str, options: argparse.Namespace, folder: pathlib.Path, cache: pathlib.Path) -> dict:
    name, unit, sides, demand = WORKS[work]
    turns: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(options.repeats):
        for side in sides:
            python = sys.executable if side.startswith("ours") else options.peers
            found = turn(python, side, folder, cache) if python else None
            turns[side] += [found] if found else []
    scale = 1e6 if unit.startswith("us") else 1.0

    def median(side: str, what: str) -> float | None:
        values = [scale * each[what] / each["units"] for each in turns[side]]
        return statistics.median(values) if values else None

    row = {"name": name, "unit": unit, "repeats": options.repeats, "demand": demand}
    for label, side in zip(("ours", "theirs"), [*sides, None]):
        row |= {label: side and median(side, "cpu"), f"{label}_seconds": side and median(side, "seconds")}
        row |= {
            f"{label}_memory_mb": statistics.median([t["memory_mb"] for t in turns[side]])
            if side and turns[side]
            else None
        }
    row["theirs_name"] = sides[1] if len(sides) > 1 else None
    row["ratio"] = row["ours"] / row["theirs"] if row["theirs"] else None
    return row


def as_text(row: dict) -> str:
    theirs = (
        f"{row['theirs_name']} {row['theirs']:.1f}"
        if row["theirs"]
        else f"{row['theirs_name'] or 'no peer'}: not there"
    )
    ratio = f"{row['ratio']:.2f}x" if row["ratio"] else ""
    missed = "  MISSED" if row["ratio"] and row["demand"] and row["ratio"] > row["demand"] else ""
    seconds = f"seconds: {row['ours_seconds']:.1f}" + (f", {row['theirs_seconds']:.1f}" if row["theirs"] else "")
    return f"{row['name']:52} {row['ours']:9.1f} {row['unit']} CPU   {theirs:28} {ratio:7} {seconds}{missed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(WORKS), help="some of the works")
    parser.add_argument("--peers", help="the Python of the others' environment")
    parser.add_argument("--files", type=int, default=100_000, help="files of the large folder")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options.side[0], pathlib.Path(options.side[1]))
        return
    for row in measure(options):
        print(json.dumps(row) if options.json else as_text(row), flush=True)


def measure(options: argparse.Namespace) -> Iterator[dict]:
    works = options.only or list(WORKS)
    with tempfile.TemporaryDirectory() as data, tempfile.TemporaryDirectory() as cache:
        make_data(pathlib.Path(data), works, options.files)
        for work in works:
            yield compare(work, options, pathlib.Path(data), pathlib.Path(cache)) | {"load": os.getloadavg()[0]}


if __name__ == "__main__":
    main()
