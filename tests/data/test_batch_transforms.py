"""Batch functions: a function of (seed, epoch, batch) alone, under any division of the rows; padding is never mixed."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny_experiment
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.data import ArraySource, CutMix, Filtered, Loader, MixUp, OneOf
from jaxdist.data.assembly import ExampleError
from jaxdist.run import components

NUM_CLASSES = 5


def source_of(num_examples):
    random = np.random.default_rng(0)
    images = random.random((num_examples, 4, 6, 1), np.float32)
    labels = np.arange(num_examples, dtype=np.int32) % NUM_CLASSES
    return ArraySource({"image": images, "label": labels, "id": np.arange(num_examples, dtype=np.int32)})


def whole_batch(batch, random, rows):
    """Rotate the rows of the batch: a function without a group size is given all of them."""
    assert len(rows.numbers) == rows.size == len(batch["mask"])
    return {**batch, "image": np.roll(batch["image"], 1, axis=0) + np.float32(random.random())}


FUNCTIONS = (MixUp(NUM_CLASSES), CutMix(NUM_CLASSES), OneOf((MixUp(NUM_CLASSES), CutMix(NUM_CLASSES))), whole_batch)


@settings(max_examples=40)
@given(
    batch_fn=st.sampled_from(FUNCTIONS),
    num_examples=st.integers(9, 30),
    size=st.integers(2, 9),
    cuts=st.lists(st.integers(0, 9), max_size=3),
    skipped=st.integers(0, 3),
)
def test_any_division_of_the_rows_and_any_restart_gives_the_same_batches(batch_fn, num_examples, size, cuts, skipped):
    loader = Loader(
        source_of(num_examples), global_batch_size=size, seed=3, num_epochs=2, batch_fn=batch_fn, num_threads=0
    )
    expected = list(loader)
    bounds = sorted({0, size, *(cut % size for cut in cuts)})
    start = expected[min(skipped, len(expected) - 2)].position
    later = expected[min(skipped, len(expected) - 2) + 1 :]
    for begin, end in itertools.pairwise(bounds):
        part = list(loader.starting_at(start).with_rows(np.arange(begin, end)))
        assert len(part) == len(later)
        for (found, position), (wanted, there) in zip(part, later):
            assert position == there
            for name, array in wanted.items():
                np.testing.assert_array_equal(found[name], array[begin:end], err_msg=name)


def parts_of(batch_fn, num_examples, size, source=None):
    """Return pairs (batch as it is read, batch as it is changed)."""
    settings = {"global_batch_size": size, "seed": 1, "num_epochs": 1, "num_threads": 0}
    source = source or source_of(num_examples)
    return list(
        zip((b for b, _ in Loader(source, **settings)), (b for b, _ in Loader(source, batch_fn=batch_fn, **settings)))
    )


def test_mixup_is_the_formula_and_leaves_rows_alone_whose_neighbour_is_padding_or_filtered():
    source = Filtered(source_of(19), lambda example: int(example["id"]) % 5 != 0, version="1")
    shares = []
    for plain, mixed in parts_of(MixUp(NUM_CLASSES, alpha=1.0), 19, 7, source):
        one_hot = np.eye(NUM_CLASSES, dtype=np.float32)[plain["label"]]
        for row in range(7):
            other = row ^ 1
            alone = other >= 7 or not plain["mask"][row] or not plain["mask"][other]
            if alone:
                np.testing.assert_array_equal(mixed["image"][row], plain["image"][row])
                if plain["mask"][row]:
                    np.testing.assert_array_equal(mixed["label"][row], one_hot[row])
                continue
            spread = plain["image"][row] - plain["image"][other]
            share = float(((mixed["image"][row] - plain["image"][other]) * spread).sum() / (spread**2).sum())
            shares.append(share)
            wanted = share * plain["image"][row] + (1 - share) * plain["image"][other]
            np.testing.assert_allclose(mixed["image"][row], wanted, atol=1e-5)
            np.testing.assert_allclose(
                mixed["label"][row], share * one_hot[row] + (1 - share) * one_hot[other], atol=1e-5
            )
        np.testing.assert_array_equal(mixed["mask"], plain["mask"])
        np.testing.assert_array_equal(mixed["id"], plain["id"])
    assert len(set(np.round(shares, 4))) > 2


def test_cutmix_has_each_pixel_of_one_of_the_pair_and_the_label_counts_them():
    for plain, mixed in parts_of(CutMix(NUM_CLASSES), 32, 8):
        for row in range(8):
            own = (mixed["image"][row] == plain["image"][row])[..., 0]
            other = (mixed["image"][row] == plain["image"][row ^ 1])[..., 0]
            assert (own | other).all()
            wanted = np.zeros(NUM_CLASSES)
            np.add.at(wanted, plain["label"][[row, row ^ 1]], [own.mean(), 1 - own.mean()])
            np.testing.assert_allclose(mixed["label"][row], wanted, atol=1e-6)
            down, across = np.flatnonzero(other.any(1)), np.flatnonzero(other.any(0))
            if down.size:  # a rectangle
                assert other[down[0] : down[-1] + 1, across[0] : across[-1] + 1].all()


def test_the_shares_are_those_of_the_beta_distribution():
    # E[share] = 1/2 and E[share^2] = (a + 1) / (2 (2a + 1)) for Beta(a, a).
    alpha, batch = 0.4, {"image": np.tile(np.float32([1, 0]), 20_000)[:, None], "label": np.zeros(40_000, np.int32)}
    loader = Loader(ArraySource(batch), global_batch_size=40_000, seed=0, shuffle=False, batch_fn=MixUp(2, alpha))
    share = next(iter(loader)).batch["image"][::2, 0].astype(np.float64)
    assert abs(share.mean() - 0.5) < 0.01
    assert abs((share**2).mean() - (alpha + 1) / (2 * (2 * alpha + 1))) < 0.01


def test_whole_numbers_are_rounded_and_keep_their_dtype():
    images = np.tile(np.uint8([0, 255]), 8).reshape(-1, 1, 1, 1)
    source = ArraySource({"image": images, "label": np.zeros(16, np.int32)})
    found = next(iter(Loader(source, global_batch_size=16, seed=0, shuffle=False, batch_fn=MixUp(2, 1.0)))).batch
    assert found["image"].dtype == np.uint8
    pairs = found["image"].astype(int).reshape(-1, 2).sum(axis=1)
    assert set(pairs.tolist()) == {255}


@pytest.mark.parametrize(
    ("batch_fn", "message"),
    [
        (MixUp(3), "label 4"),
        (MixUp(NUM_CLASSES, field="picture"), "'picture'.*'image'"),
        (CutMix(NUM_CLASSES, field="id"), "CutMix needs images"),
        (lambda batch, random, rows: {"image": batch["image"]}, "'mask' among them"),
        (lambda batch, random, rows: {**batch, "image": batch["image"][1:]}, "as many rows"),
        (lambda batch, random, rows: 1 / 0, "batch before example"),
    ],
)
def test_what_cannot_be_mixed_is_named(batch_fn, message):
    loader = Loader(source_of(20), global_batch_size=10, seed=0, batch_fn=batch_fn)
    with pytest.raises(ExampleError, match=message):
        next(iter(loader))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "reduction"), [("data-parallel", "canonical"), ("fsdp", "mean")])
def test_a_step_on_mixed_batches_is_that_of_one_device(strategy, reduction):
    tiny = tiny_experiment.get_config()
    changed = dataclasses.replace(tiny.data, batch_fn=MixUp(2, alpha=1.0))
    model = dataclasses.replace(tiny.model, dropout_rate=0.0)
    layout = dataclasses.replace(tiny.layout, min_size=9)
    experiment = dataclasses.replace(tiny, model=model, data=changed, layout=layout)
    params = []
    for name, how, num_devices in ((strategy, reduction, 4), ("data-parallel", "mean", 1)):
        chosen = dataclasses.replace(experiment, strategy=name, reduction=how)
        parts = components.put_together(chosen, devices=jax.devices()[:num_devices])
        batches = parts.batches()
        state, metrics = parts.step(parts.create_state(), next(batches)[0])
        batches.close()
        assert np.isfinite(metrics["loss"].value if hasattr(metrics["loss"], "value") else metrics["loss"])
        params.append(jax.tree.map(np.asarray, jax.device_get(state.params)))
    for one, other in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_settings_that_make_no_sense_are_refused():
    for wrong in (lambda: MixUp(1), lambda: CutMix(10, alpha=0), lambda: OneOf(()), lambda: OneOf((MixUp(2),), (-1,))):
        with pytest.raises(ValueError, match="got"):
            wrong()
