"""Whether examples can be read, are the same each time, and have labels that the model knows."""

import concurrent.futures
import functools
import itertools
import warnings
from typing import Any

import jax
import numpy as np

from jaxdist import adapters, data, errors, losses
from jaxdist.config import data_fields
from jaxdist.config.experiment import Experiment
from jaxdist.data import assembly, assembly_process, placement
from jaxdist.data.sources.source import MASK, Example, plain_array, rows_of
from jaxdist.data.sources.source import check_labels as check_array
from jaxdist.data.sources.subset import Subset
from jaxdist.errors import ConfigError
from jaxdist.run.preflight.losses_and_metrics import Shapes, outputs_of
from jaxdist.spmd import state

EARLY_BATCHES = 64
"""Among how many batches of training those are that are looked at before the first step."""
_SAMPLED_BATCHES = 8
_MOST_LEFT_OUT = 10_000
"""How many examples are looked at for one that counts."""
_REPEATED_BATCHES, _TRIES = 4, 8


def check_samples(
    loader: data.Loader, setting: str, *, among: int | None = None
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Read examples of some batches, from the first on; return the forms of a batch that were found, each once.

    `setting` is what they are called in messages, such as `data.train`.

    Raises:
      ValueError: a worker process, a batch or a device could not take them, or none of them counts.
    """
    if loader.num_workers:
        no_source: Any = None  # which may hold all the data
        assembly_process.dump_recipe(loader.recipe._replace(source=no_source))
    found, counts = [], False
    for ids, arrays in loader.samples(_SAMPLED_BATCHES, among=among):
        counts |= bool(arrays[MASK].any())
        placement.check_numbers(arrays, functools.partial(np.asarray, ids))
        form = {name: (array.shape[1:], jax.dtypes.canonicalize_dtype(array.dtype)) for name, array in arrays.items()}
        found += [form] if form not in found else []
    if found and not counts:
        _check_that_some_count(loader, setting)
    return [
        {name: jax.ShapeDtypeStruct((loader.global_batch_size, *shape), dtype) for name, (shape, dtype) in form.items()}
        for form in found
    ]


def _check_that_some_count(loader: data.Loader, setting: str) -> None:
    """Raise ConfigError where no example counts; warn where that is so of the first ten thousand."""
    if loader.any_counts(_MOST_LEFT_OUT):
        return
    size = len(loader.source)
    which = f"of its {size}" if size <= _MOST_LEFT_OUT else f"of its first {_MOST_LEFT_OUT}"
    message = f"{setting}: none {which} examples counts: its filter or its masks leave all of them out."
    if size <= _MOST_LEFT_OUT:
        raise ConfigError(f"{message} Correct what chooses them, such as keep_fn of data.Filtered.")
    warnings.warn(message, stacklevel=2)


def check_repeatable(loader: data.Loader, setting: str, *, same_bits: bool) -> None:
    """Make some examples a second time, and warn where they come out different.

    `setting` is what they are called in messages, such as `data.train`.

    Raises:
      ConfigError: they do, and `same_bits`; or the source has others in a batch than alone.
    """
    is_fixed = rows_of(loader.source) is not None and loader.example_fn is loader.batch_fn is None
    if is_fixed or getattr(loader.source, "reads_forward", False):
        return  # readers of streams are tried when the stream is made
    once, again = (loader.samples(_REPEATED_BATCHES, among=EARLY_BATCHES) for _ in range(2))
    for (ids, first), (_, second) in zip(once, again):
        changed = [name for name, array in first.items() if not _are_equal(array, second.get(name))]
        if not changed:
            _check_batch(loader.recipe, ids, setting)
            continue
        message = (
            f"{setting}: {changed[0]!r} of example {ids[0]} or {ids[-1]} was another one when it was made again. Same "
            "bits anywhere, resuming and replaying need examples that are functions of seed, epoch and example. "
            f"{_cause(loader, ids)}"
        )
        if same_bits:
            raise ConfigError(message)
        warnings.warn(message, stacklevel=2)
        return


def check_arrays_of_their_own(loader: data.Loader, setting: str, *, alone: bool) -> None:
    """Read an example while another is kept, in another thread, as batches are made.

    With `alone`, nothing but the loader reads from its source and calls its example_fn.

    Raises:
      ConfigError: the one that was kept has changed.
    """
    in_turn = alone and loader.num_threads <= 1
    if in_turn or loader.num_workers or loader.recipe.whole or getattr(loader.source, "reads_forward", False):
        return  # worker processes have copies of the source
    for plan in itertools.islice(loader.plans(), _REPEATED_BATCHES):
        kept_id, read_id = map(int, plan.ids[np.flatnonzero(plan.mask)[[0, -1]]])
        name = _changed_by_reading(loader.recipe, kept_id, read_id)
        if name is None:
            continue
        in_source = _changed_by_reading(loader.recipe._replace(example_fn=None), kept_id, read_id) is not None
        what = f"{type(loader.source).__name__}.__getitem__" if in_source else errors.named(loader.recipe.example_fn)
        raise ConfigError(
            f"{setting}: {name!r} of example {kept_id} changed when another thread read example {read_id}: "
            f"{what} fills the same array for each example, and several threads make batches. Return a new array for "
            "each, such as a copy."
        )


def _changed_by_reading(recipe: assembly.Recipe, kept_id: int, read_id: int) -> str | None:
    """Return a field of an example that changes when another thread reads another example; None if none does."""
    try:
        kept = assembly.make_example(recipe, 0, kept_id)
        arrays = {name: plain_array(name, value) for name, value in kept.items()}
        before = {name: array.copy() for name, array in arrays.items()}
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(assembly.make_example, recipe, 0, read_id).result()
    except ValueError:
        return None  # of examples that cannot be read, what makes batches says more
    return next((name for name, array in arrays.items() if not _are_equal(before[name], array)), None)


def _check_batch(recipe: assembly.Recipe, ids: np.ndarray, setting: str) -> None:
    """Raise ConfigError where `__getitems__` of the source returns others than `__getitem__`, up to rounding."""
    if not recipe.whole:
        return
    batch = assembly.gather(recipe.source, ids)
    for row, example_id in enumerate(ids.tolist()):
        alone = assembly.make_example(recipe, 0, example_id)
        differing = [name for name in {**batch, **alone} if not _are_close(batch, alone, name, row)]
        if differing:
            raise ConfigError(
                f"{setting}: {differing[0]!r} of example {example_id} is another one in a batch, which "
                f"{type(recipe.source).__name__}.__getitems__ returns, than alone. Correct it, or leave it out: "
                "examples are then read one by one."
            )


def _are_close(batch: assembly.HostArrays, alone: Example, name: str, row: int) -> bool:
    if name not in batch or name not in alone:
        return False
    one, other = np.asarray(batch[name][row]), np.asarray(alone[name])
    if one.dtype.kind in "fc" and one.shape == other.shape:
        return np.allclose(one, other, rtol=1e-3, equal_nan=True)
    return np.array_equal(one, other)


def _are_equal(first: np.ndarray, second: np.ndarray | None) -> bool:
    if second is None or first.shape != second.shape or first.dtype != second.dtype:
        return False
    return first.dtype == object or first.tobytes() == second.tobytes()


def _cause(loader: data.Loader, ids: np.ndarray) -> str:
    """Return what makes examples differ, and what to do."""

    def differs(recipe: assembly.Recipe, example_id: int) -> bool:
        first, *others = (assembly.make_example(recipe, 0, example_id) for _ in range(_TRIES))
        pairs = ((first[name], other.get(name)) for other in others for name in first)
        return any(not _are_equal(np.asarray(one), np.asarray(two)) for one, two in pairs)

    recipe = loader.recipe
    if any(differs(recipe._replace(example_fn=None), int(each)) for each in ids):
        return "The source draws by itself: draw in example_fn, which gets a generator."
    if recipe.example_fn is None and loader.batch_fn is None:
        return "The source has other examples under the same numbers than before."
    by_example = recipe.example_fn is not None and any(differs(recipe, int(each)) for each in ids)
    function = recipe.example_fn if by_example else loader.batch_fn
    return f"{errors.named(function)} has to draw from its second argument, a generator, and from nothing else."


def check_labels(
    experiment: Experiment, functions: adapters.Functions, abstract: state.TrainState, shapes: Shapes
) -> None:
    """Raise ConfigError where a label of examples that are held in arrays is no class of the model.

    Labels that are read one by one, or made by an `example_fn`, are checked when they are trained on.
    """
    loss = experiment.loss
    field = "label" if loss is losses.classification else getattr(loss, "label", None)
    if functions.predict_fn is None or not (loss is losses.classification or isinstance(loss, losses.Classification)):
        return
    num_classes = outputs_of(functions, abstract, shapes).shape[-1]
    examples = experiment.data
    sets = [("data.train", examples.train, examples.example_fn)]
    for name, each in data_fields.named_sources(examples.eval).items():
        sets.append((data_fields.setting_of_set(name), each, examples.eval_example_fn))
    for setting, source, example_fn in sets:
        labels = None if example_fn is not None else _labels_in_memory(source, str(field))
        if labels is not None and labels.dtype.kind in "iu":  # probabilities are floats, which the loss checks
            try:
                check_array(labels.reshape(-1), str(field), num_classes)
            except ValueError as error:
                raise ConfigError(f"{setting}: {error}") from error


def _labels_in_memory(source: Any, field: str) -> np.ndarray | None:
    """Return a field of all examples where arrays hold it; None where each would have to be read."""
    if isinstance(source, Subset):
        whole = _labels_in_memory(source.source, field)
        return None if whole is None else whole[source.ids]
    rows = rows_of(source)
    return None if rows is None else rows.get(field)
