import dataclasses
import random as of_python
import re
import threading

import jax
import numpy as np
import pytest
import tiny_experiment

import jaxdist
from jaxdist import data
from jaxdist.errors import ConfigError
from jaxdist.run import components, preflight


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_no_class_is_refused_before_the_run(part, label):
    experiment = tiny_experiment.get_config()
    source = getattr(experiment.data, part)
    labels = source.arrays["label"].copy()
    labels[5] = label
    changed = jaxdist.ArraySource({**source.arrays, "label": labels})
    chosen = jaxdist.data.Subset(changed, range(4, len(labels)))
    for given, place in ((changed, 5), (chosen, 1)):
        wrong = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **{part: given}))
        with pytest.raises(ConfigError, match=rf"data\.{part}: Label out of range: example {place} has label {label}"):
            components.put_together(wrong, devices=jax.devices()[:1])


@pytest.mark.parametrize("part", ["train", "eval"])
def test_examples_of_which_none_counts_are_refused_and_one_suffices(part, monkeypatch):
    experiment = tiny_experiment.get_config()
    source = getattr(experiment.data, part)
    last = source.arrays["image"][:, 0].max()

    def keeping(keep_fn):
        chosen = data.Filtered(source, keep_fn, version="1")
        changed = dataclasses.replace(experiment.data, **{part: chosen})
        components.put_together(dataclasses.replace(experiment, data=changed), devices=jax.devices()[:1])

    keeping(lambda example: example["image"][0] == last)
    with pytest.raises(ConfigError, match=rf"data\.{part}: none of its {len(source)} examples counts: its filter"):
        keeping(lambda example: False)
    monkeypatch.setattr(preflight.examples, "_MOST_LEFT_OUT", 4)
    with pytest.warns(UserWarning, match=rf"data\.{part}: none of its first 4 examples counts"):
        keeping(lambda example: False)


def test_labels_in_memory_may_be_probabilities():
    experiment = tiny_experiment.get_config()
    soft = {
        part: jaxdist.ArraySource({**source.arrays, "label": np.eye(2, dtype=np.float32)[source.arrays["label"]]})
        for part, source in (("train", experiment.data.train), ("eval", experiment.data.eval))
    }
    changed = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **soft))
    components.put_together(changed, devices=jax.devices()[:1])


ARRAYS = {"image": np.ones((64, 4), np.float32), "label": np.zeros(64, np.int32)}


SHARED = np.random.default_rng()
"""What users keep beside their functions: it has another state at each call."""


class Drawing:
    """A source that draws a number each time, as data sets of torch often do."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"image": SHARED.normal(size=4).astype(np.float32), "label": np.int32(0)}


def by_numpy(example, random):
    return {**example, "image": example["image"] + SHARED.normal(size=4).astype(np.float32)}


def halves(example, random):
    return {**example, "image": example["image"] * np.float32(of_python.random())}


def by_python(example, random):
    return {**example, "image": example["image"][:: of_python.choice([1, -1])] * of_python.random()}


def by_its_own_generator(example, random):
    return {**example, "image": example["image"] + random.normal(size=4).astype(np.float32)}


def not_a_number(example, random):
    return {**example, "image": example["image"] * np.float32(np.nan)}


def batch_by_numpy(batch, random, rows):
    return {**batch, "image": batch["image"] + SHARED.normal(size=batch["image"].shape).astype(np.float32)}


def make_loader(source=None, **settings):
    return data.Loader(data.ArraySource(ARRAYS) if source is None else source, global_batch_size=16, seed=0, **settings)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"source": data.MapSource(Drawing())}, "The source draws by itself"),
        ({"example_fn": by_numpy}, r"by_numpy \(.*\) has to draw from its second argument"),
        ({"example_fn": by_python}, r"by_python \(.*\) has to draw from its second argument"),
        ({"batch_fn": batch_by_numpy}, r"batch_by_numpy \(.*\) has to draw from its second argument"),
    ],
)
def test_examples_that_come_out_different_are_told_and_refused_where_bits_are_promised(settings, cause):
    message = rf"data\.train: 'image' of example \d+ or \d+ was another one when it was made again.*{cause}"
    with pytest.warns(UserWarning, match=message):
        preflight.check_repeatable(make_loader(**settings), "data.train", same_bits=False)
    with pytest.raises(ConfigError, match=message):
        preflight.check_repeatable(make_loader(**settings), "data.train", same_bits=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"example_fn": by_its_own_generator},
        {"example_fn": not_a_number},
        {"batch_fn": data.MixUp(num_classes=3)},
        {"source": data.MapSource([{"image": np.ones(4), "label": 1}] * 64)},
    ],
)
def test_examples_that_are_the_same_each_time_pass(settings):
    preflight.check_repeatable(make_loader(**settings), "data.train", same_bits=True)


class Tripled:
    """A source whose batches are three times its examples, or nearly the same where `factor` says so."""

    def __init__(self, factor=3.0):
        self.factor = factor

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"image": np.full(4, index, np.float32), "label": index % 3}

    def __getitems__(self, ids):
        image = np.repeat(np.asarray(ids, np.float32)[:, None], 4, axis=1)
        return {"image": image * np.float32(self.factor), "label": np.asarray(ids) % 3}

    def fingerprint(self):
        return "tripled"


class Listed(Tripled):
    def __getitems__(self, ids):
        return [self[each] for each in ids]


def test_a_source_whose_batches_are_not_its_examples_is_refused():
    message = r"data\.train: 'image' of example \d+ is another one in a batch, which Tripled\.__getitems__ returns"
    with pytest.raises(ConfigError, match=message):
        preflight.check_repeatable(make_loader(Tripled()), "data.train", same_bits=False)
    preflight.check_repeatable(make_loader(Tripled(1 + 1e-6)), "data.train", same_bits=True)
    with pytest.raises(ValueError, match=r"that of Listed returned an object of <class 'list'>"):
        preflight.check_samples(make_loader(Listed()), "data.train")


def test_a_subclass_of_arrays_that_draws_by_itself_is_told():
    class Noisy(data.ArraySource):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return {**example, "image": example["image"] + SHARED.normal(size=example["image"].shape)}

    with pytest.raises(ConfigError, match="The source draws by itself"):
        preflight.check_repeatable(make_loader(Noisy(ARRAYS)), "data.train", same_bits=True)


def test_training_and_evaluation_are_both_looked_at():
    experiment = tiny_experiment.get_config()
    for name, setting in {"example_fn": "data.train", "eval_example_fn": "data.eval"}.items():
        changed = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **{name: halves}))
        with pytest.warns(UserWarning, match=re.escape(f"{setting}: 'image' of example")):
            components.put_together(changed, devices=jax.devices()[:1])


class Filling:
    """A source that fills one array for each example, or one for each thread."""

    def __init__(self, holder):
        self._holder = holder

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if not hasattr(self._holder, "image"):
            self._holder.image = np.zeros(4, np.float32)
        self._holder.image[:] = index
        return {"image": self._holder.image, "label": np.int32(0)}

    def fingerprint(self):
        return "filling"


def filling_fn(example, random, image=np.zeros(4, np.float32)):  # noqa: B008
    image[:] = random.random()
    return {**example, "image": image}


class Holder:
    pass


@pytest.mark.parametrize(
    ("settings", "who"),
    [
        ({"source": Filling(Holder())}, r"Filling\.__getitem__"),
        ({"source": data.MapSource(Filling(Holder()))}, r"MapSource\.__getitem__"),
        ({"example_fn": filling_fn}, r"filling_fn \(.*\)"),
    ],
)
def test_examples_in_one_array_are_refused_where_several_threads_would_fill_it(settings, who):
    message = rf"data\.train: 'image' of example \d+ changed when another thread read example \d+: {who} fills the same"
    for num_threads, alone in ((2, True), (0, False)):
        with pytest.raises(ConfigError, match=message):
            preflight.check_arrays_of_their_own(
                make_loader(num_threads=num_threads, **settings), "data.train", alone=alone
            )
    preflight.check_arrays_of_their_own(make_loader(num_threads=0, **settings), "data.train", alone=True)
    preflight.check_arrays_of_their_own(make_loader(num_workers=1, **settings), "data.train", alone=False)


def test_an_array_for_each_thread_is_enough():
    source = Filling(threading.local())
    preflight.check_arrays_of_their_own(make_loader(source, num_threads=2), "data.train", alone=False)


def test_a_run_looks_at_the_arrays_of_training_and_evaluation():
    experiment = tiny_experiment.get_config()
    for name, setting in {"example_fn": "data.train", "eval_example_fn": "data.eval"}.items():
        changed = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **{name: filling_six}))
        with pytest.raises(ConfigError, match=re.escape(f"{setting}: 'image' of example")):
            components.put_together(changed, devices=jax.devices()[:1])


def filling_six(example, random, image=np.zeros(6, np.float32)):  # noqa: B008
    image[:] = example["image"]
    return {**example, "image": image}
