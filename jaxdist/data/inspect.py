"""A look at a data set: its fields, a few examples, and where the time goes."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Mapping

import numpy as np

from jaxdist.data.assembly import BatchBuffer, HostArrays, Made, example_random, gather, with_mask
from jaxdist.data.loader import Loader
from jaxdist.data.sources.source import MASK, own_fields
from jaxdist.data.sources.vocabulary import vocabulary_of

_SHADES = " .:-=+*#%@"
_MAX_WIDTH = 48
_MAX_NAMES = 20


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
      source: the kind of source.
      num_examples, steps_per_epoch, global_batch_size, fingerprint: of the loader.
      fields: by name, the shape and the dtype of one example's field, and its smallest and largest value.
      examples: the first examples of the epoch.
      microseconds: what an example costs in one thread, by stage: `source` (reading), `transform` (example_fn),
        `assembly` (copying into the batch); and `wait`, what a step that takes no time waits for an example of the
        loader as it is set up.
      examples_per_second: of the loader as configured.
      vocabulary: by field, the names that its numbers stand for.
      promise: what holds of each example, where the source is a stream.
    """

    source: str
    num_examples: int
    steps_per_epoch: int
    global_batch_size: int
    fingerprint: str
    fields: Mapping[str, tuple[tuple[int, ...], str, float, float]]
    examples: list[HostArrays]
    microseconds: Mapping[str, float]
    examples_per_second: float
    vocabulary: Mapping[str, tuple[str, ...]]
    promise: str = ""


def inspect(loader: Loader, *, num_shown: int = 3, num_batches: int = 20) -> Inspection:
    """Read some batches of a loader and return their fields and costs."""
    first_batch, delivered = _time_loader(loader, num_batches)
    size = len(first_batch[MASK])
    examples = [{name: value[row] for name, value in first_batch.items()} for row in range(min(num_shown, size))]
    fields = {
        name: (value.shape[1:], str(value.dtype), float(value.min()), float(value.max()))
        for name, value in first_batch.items()
        if value.size
    }
    return Inspection(
        source=type(loader.source).__name__,
        num_examples=len(loader.source),
        steps_per_epoch=loader.steps_per_epoch,
        global_batch_size=loader.global_batch_size,
        fingerprint=loader.beginning.fingerprint,
        fields=fields,
        examples=examples,
        microseconds={**_time_stages(loader, min(num_batches, loader.steps_per_epoch)), "wait": 1e6 / delivered},
        examples_per_second=delivered,
        vocabulary=vocabulary_of(loader.source),
        promise=getattr(loader.source, "promise", ""),
    )


def render(inspection: Inspection) -> str:
    """Return the inspection as text for people."""
    lines = [
        f"source       {inspection.source}, {inspection.num_examples:,} examples",
        f"epoch        {inspection.steps_per_epoch:,} steps of {inspection.global_batch_size} examples",
        f"fingerprint  {inspection.fingerprint}",
        *([f"promise      {inspection.promise}"] if inspection.promise else []),
        "",
        *_table(
            ["field", "shape", "dtype", "smallest", "largest"],
            [
                [name, str(shape), dtype, f"{low:.6g}", f"{high:.6g}"]
                for name, (shape, dtype, low, high) in inspection.fields.items()
            ],
        ),
    ]
    for field, names in inspection.vocabulary.items():
        shown = ", ".join(f"{number} {name}" for number, name in enumerate(names[:_MAX_NAMES]))
        lines += ["", f"names of {field}: {shown}{' ...' if len(names) > _MAX_NAMES else ''}"]
    for number, example in enumerate(inspection.examples, start=1):
        lines += ["", f"example {number}: {_scalars(example)}"]
        for name, value in example.items():
            lines += _picture(value) or _text(name, value)
    total = sum(inspection.microseconds[stage] for stage in ("source", "transform", "assembly"))
    rows = []
    for stage, cost in inspection.microseconds.items():
        share = "" if stage == "wait" else f"{cost / max(total, 1e-9):.0%}"
        rows.append([stage, f"{cost:,.1f}", share])
    lines += ["", *_table(["where the time goes", "microseconds an example", "share"], rows), ""]
    return "\n".join([*lines, f"throughput   {inspection.examples_per_second:,.0f} examples/s as set up"])


def _time_loader(loader: Loader, num_batches: int) -> tuple[HostArrays, float]:
    """Return the first batch, and the examples a second of those after it (of itself, where it is alone)."""
    with contextlib.closing(iter(loader)) as batches:
        start = time.perf_counter()
        first = next(batches).batch
        first_seconds = time.perf_counter() - start
        start = time.perf_counter()
        count = sum(len(batch[MASK]) for batch, _ in itertools.islice(batches, num_batches))
        seconds = time.perf_counter() - start
    return first, count / seconds if count else len(first[MASK]) / first_seconds


def _time_stages(loader: Loader, num_batches: int) -> dict[str, float]:
    """Return the microseconds that an example takes in each stage, one after the other in this thread."""
    seconds = dict.fromkeys(("source", "transform", "assembly"), 0.0)
    count = 0
    for plan in itertools.islice(loader.plans(), num_batches):
        count += len(plan.ids)
        if loader.recipe.whole:
            start = time.perf_counter()
            made = Made(gather(loader.source, plan.ids), {})
            seconds["source"] += time.perf_counter() - start
        else:
            buffer = BatchBuffer(len(plan.ids))
            for row, example_id in enumerate(plan.ids.tolist()):
                times = [time.perf_counter()]
                example = loader.source[example_id]
                times.append(time.perf_counter())
                if loader.example_fn is not None:
                    example = loader.example_fn(
                        own_fields(example), example_random(loader.seed, plan.epoch, example_id)
                    )
                times.append(time.perf_counter())
                buffer.write(row, example_id, example)
                times.append(time.perf_counter())
                for stage, (begin, end) in zip(seconds, itertools.pairwise(times)):
                    seconds[stage] += end - begin
            made = buffer.finish()
        start = time.perf_counter()
        with_mask(made, plan.mask)
        seconds["assembly"] += time.perf_counter() - start
    return {stage: 1e6 * value / count for stage, value in seconds.items()}


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *rows]]


def _scalars(example: HostArrays) -> str:
    return "  ".join(f"{name} {value.item():.6g}" for name, value in example.items() if value.ndim == 0)


def _picture(value: np.ndarray) -> list[str]:
    """Return an image (height, width[, 1 or 3]) as lines of text, dark to bright; nothing for anything else."""
    if value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[-1] not in (1, 3)) or min(value.shape[:2]) < 2:
        return []
    grey = value.astype(np.float64) if value.ndim == 2 else value.astype(np.float64).mean(axis=-1)
    step = -(-max(grey.shape) // _MAX_WIDTH)
    grey = grey[::step, ::step]
    darkest = np.min(grey)
    span = max(np.max(grey) - darkest, 1e-12)
    levels = ((grey - darkest) / span * (len(_SHADES) - 1)).round().astype(int)
    return ["  " + "".join(2 * _SHADES[level] for level in row) for row in levels]


def _text(name: str, value: np.ndarray) -> list[str]:
    """Return a field of one dim as text where it may be bytes, else as its first numbers."""
    if value.ndim != 1:
        return []
    if value.dtype.kind in "iu" and value.size and value.min() >= 9 and value.max() < 256:
        return [f"  {name}: {value[:200].astype(np.uint8).tobytes().decode('utf-8', 'replace')!r}"]
    return [f"  {name}: {np.array2string(value[:10], precision=4, separator=' ')}{' ...' if value.size > 10 else ''}"]
