import gc
import itertools
import json
import multiprocessing
import os
import threading

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from jaxdist.data import ArraySource, Loader, ParquetSource, Position, Subset, TokenSource
from jaxdist.data.sources.source import COUNTS, MASK, reads_batches


def source_of(num_examples):
    return ArraySource({"id": np.arange(num_examples), "twice": np.arange(num_examples, dtype=np.float32)[:, None] * 2})


def jitter(example, random):
    return {"id": example["id"], "noise": random.random(3)}


def true_ids(batch):
    return batch["id"][batch["mask"] == 1].tolist()


def collect(loader):
    batches = list(loader)
    return [batch for batch, _ in batches], [position for _, position in batches]


@pytest.mark.parametrize("num_threads", [0, 1, 3])
@pytest.mark.parametrize("example_fn", [None, jitter], ids=["whole", "transformed"])
def test_an_epoch_holds_every_example_once(num_threads, example_fn):
    loader = Loader(
        source_of(23), global_batch_size=8, seed=1, num_epochs=2, num_threads=num_threads, example_fn=example_fn
    )
    batches, positions = collect(loader)
    assert loader.steps_per_epoch == 3
    assert [position.position for position in positions] == [8, 16, 23] * 2
    assert [position.epoch for position in positions] == [0, 0, 0, 1, 1, 1]
    for epoch in (0, 1):
        ids = [i for batch in batches[3 * epoch : 3 * epoch + 3] for i in true_ids(batch)]
        assert sorted(ids) == list(range(23))
    last = batches[2]
    assert last["id"].shape == (8,)
    assert last["mask"].tolist() == [1.0] * 7 + [0.0]
    assert last["mask"].dtype == np.float32
    assert last["id"][7] == last["id"][0]


def run_parts(num_examples, parts, seed):
    """Train `steps` batches of each part's size on its hosts, resuming in between; return the ids of each epoch."""
    source, position, seen = source_of(num_examples), None, {}
    for num_hosts, device_rows, steps in parts:
        size = num_hosts * device_rows
        hosts = (
            [
                iter(
                    Loader(
                        source,
                        global_batch_size=size,
                        seed=seed,
                        start=position,
                        num_threads=0,
                        num_epochs=10**9,
                        shuffle=True,
                        rows=np.arange(host * device_rows, (host + 1) * device_rows),
                    )
                )
                for host in range(num_hosts)
            ]
            if size <= num_examples
            else []
        )
        for _ in range(steps if hosts else 0):
            made = [next(host) for host in hosts]
            assert len({item.position for item in made}) == 1
            position = Position.from_json(json.loads(json.dumps(made[0].position.to_json())))
            for batch, _ in made:
                seen.setdefault(position.epoch, []).extend(true_ids(batch))
    return seen, position


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    st.integers(1, 200),
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6),
    st.integers(0, 3),
)
def test_stops_and_restarts_with_other_hosts_and_batch_sizes_lose_and_repeat_nothing(num_examples, parts, seed):
    seen, position = run_parts(num_examples, parts, seed)
    for epoch, ids in seen.items():
        assert len(set(ids)) == len(ids)
        if epoch < position.epoch or position.position == num_examples:
            assert sorted(ids) == list(range(num_examples))
        else:
            assert len(ids) == position.position


def epoch_of_hosts(source, num_hosts, per_host):
    """Return the true ids of an epoch, host by host, and how many steps each host takes."""
    size, ids, steps = num_hosts * per_host, [], []
    for host in range(num_hosts):
        loader = Loader(
            source,
            global_batch_size=size,
            seed=0,
            num_threads=0,
            num_epochs=1,
            rows=np.arange(host * per_host, (host + 1) * per_host),
            shuffle=size <= len(source),  # data for training have a batch at least
        )
        batches = [batch for batch, _ in loader]
        ids += [batch["id"][batch["mask"] == 1] for batch in batches]
        steps.append(len(batches))
        assert len(batches) == loader.steps_per_epoch
    return np.concatenate(ids), set(steps)


@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.soak, id="all"), pytest.param(17, id="every 17th")]
)
def test_brute_force_each_example_once_per_epoch_and_all_hosts_take_the_same_steps(every):
    cases = itertools.product(range(1, 201), range(1, 9), (1, 2, 3, 5, 8, 13))
    for num_examples, num_hosts, per_host in itertools.islice(cases, 0, None, every):
        ids, steps = epoch_of_hosts(source_of(num_examples), num_hosts, per_host)
        np.testing.assert_array_equal(np.sort(ids), np.arange(num_examples))
        assert len(steps) == 1


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_rows_of_hosts_join_to_the_one_host_batch(num_threads):
    def load(rows):
        loader = Loader(
            source_of(30),
            global_batch_size=8,
            seed=5,
            num_epochs=1,
            rows=rows,
            example_fn=jitter,
            num_threads=num_threads,
        )
        return collect(loader)[0]

    alone, parts = load(None), [load(np.arange(4)), load(np.arange(4, 8))]
    for index, batch in enumerate(alone):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([part[index][name] for part in parts]))


def test_randomness_depends_on_seed_epoch_and_example_only():
    def noise(seed, **settings):
        found = {}
        loader = Loader(source_of(12), seed=seed, num_epochs=2, example_fn=jitter, **settings)
        for batch, position in loader:
            for row in np.flatnonzero(batch["mask"]):
                found[position.epoch, int(batch["id"][row])] = tuple(batch["noise"][row])
        return found

    first = noise(0, global_batch_size=4)
    assert first == noise(0, global_batch_size=5, num_threads=3, shuffle=False)
    assert len(set(first.values())) == 24
    assert not set(first.values()) & set(noise(1, global_batch_size=4).values())


def test_resume_goes_on_where_training_stopped():
    whole = collect(Loader(source_of(20), global_batch_size=6, seed=2, num_epochs=3))[0]
    _, positions = collect(Loader(source_of(20), global_batch_size=6, seed=2, num_epochs=1))
    for done, start in enumerate(positions, start=1):
        rest = collect(Loader(source_of(20), global_batch_size=6, seed=2, num_epochs=3, start=start))[0]
        assert len(rest) == len(whole) - done
        for ours, theirs in zip(rest, whole[done:]):
            np.testing.assert_array_equal(ours["id"], theirs["id"])


def test_position_is_small_and_survives_json():
    position = Loader(source_of(20), global_batch_size=6, seed=2).start
    text = json.dumps(position.to_json())
    assert len(text) < 1000
    assert Position.from_json(json.loads(text)) == position
    with pytest.raises(ValueError, match="keys"):
        Position.from_json({"epoch": 1})


def test_changed_data_are_refused_and_both_fingerprints_named():
    start = Loader(source_of(20), global_batch_size=6, seed=2).start
    changed = source_of(20)
    changed.arrays["id"][3] = 99
    with pytest.raises(ValueError) as caught:
        Loader(changed, global_batch_size=6, seed=2, start=start)
    assert start.fingerprint in str(caught.value)
    assert changed.fingerprint() in str(caught.value)
    with pytest.raises(ValueError, match="seed"):
        Loader(source_of(20), global_batch_size=6, seed=3, start=start)
    with pytest.raises(ValueError, match="order_version"):
        Loader(source_of(20), global_batch_size=6, seed=2, start=start, shuffle=False)


def test_fewer_examples_than_a_training_batch_are_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        Loader(source_of(5), global_batch_size=6, seed=0)
    (batch,), _ = collect(Loader(source_of(5), global_batch_size=6, seed=0, shuffle=False, num_epochs=1))
    assert batch["mask"].sum() == 5


@pytest.mark.parametrize("mask", [np.zeros((5, 3, 3), np.int32), np.ones(5, np.int64)], ids=["segmentation", "column"])
def test_a_field_of_the_data_named_mask_is_refused(mask):
    """It would silently become loss weights."""
    source = ArraySource({"id": np.arange(5), "mask": mask})
    with pytest.raises(ValueError, match=r"'mask' is the name of the package's own field.*Rename it"):
        Loader(source, global_batch_size=4, seed=0).first_example()


def test_what_a_source_says_of_which_examples_count_joins_the_padding():
    source = ArraySource({"id": np.arange(5), COUNTS: np.array([1, 0, 1, 1, 1], bool)})
    batches, _ = collect(Loader(source, global_batch_size=4, seed=0, shuffle=False, num_epochs=1))
    assert [batch["mask"].tolist() for batch in batches] == [[1, 0, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_exception_names_the_example(num_threads):
    def uneven(example, random):
        return {"x": np.zeros(3 if example["id"] == 7 else 2)}

    loader = Loader(source_of(10), global_batch_size=5, seed=0, example_fn=uneven, num_threads=num_threads)
    with pytest.raises(ValueError, match=r"[Ee]xample \d"):
        list(loader)
    strings = Loader(source_of(10), global_batch_size=5, seed=0, example_fn=lambda e, r: {"name": np.array("a")})
    with pytest.raises(ValueError, match="dtype"):
        next(iter(strings))


def test_closing_early_ends_the_threads():
    before = set(threading.enumerate())
    iterator = iter(Loader(source_of(100), global_batch_size=5, seed=0, example_fn=jitter, num_threads=3))
    next(iterator)
    assert set(threading.enumerate()) - before
    iterator.close()
    assert not set(threading.enumerate()) - before


def with_pid(example, random):
    return {"id": example["id"], "pid": np.int64(os.getpid())}


@pytest.fixture
def children():
    """Return a function that returns the processes which this test has started and that are alive."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


def test_workers_are_kept_for_the_next_iteration_until_the_loader_is_closed(children):
    settings = {"seed": 0, "num_epochs": 1, "example_fn": with_pid, "num_workers": 2, "shuffle": False}
    with Loader(source_of(12), global_batch_size=4, **settings) as loader:
        first, positions = collect(loader)
        again, _ = collect(loader)
        rest, _ = collect(loader.starting_at(positions[0]).with_rows(np.arange(2, 4)))
        assert [true_ids(batch) for batch in again] == [true_ids(batch) for batch in first]
        assert [true_ids(batch) for batch in rest] == [[6, 7], [10, 11]]
        pids = {int(pid) for batch in first for pid in batch["pid"]}
        assert {int(pid) for batch in [*again, *rest] for pid in batch["pid"]} <= pids
        assert pids == {child.pid for child in children()}
    assert not children()
    batches = iter(loader)
    assert int(next(batches).batch["pid"][0]) not in pids
    batches.close()  # before its end: unfinished work is dropped with the workers
    assert not children()


def test_a_forgotten_loader_ends_its_workers(children):
    loader = Loader(source_of(4), global_batch_size=4, seed=0, num_epochs=1, example_fn=with_pid, num_workers=1)
    collect(loader)
    assert children()
    del loader
    gc.collect()
    assert not children()


def test_a_loader_starts_at_positions_of_its_own_data_only():
    loader = Loader(source_of(8), global_batch_size=4, seed=0)
    with pytest.raises(ValueError, match="seed"):
        loader.starting_at(Loader(source_of(8), global_batch_size=4, seed=1).beginning)


def test_a_source_whose_arrays_were_filled_anew_is_another():
    source = ArraySource({"x": np.zeros((8, 2), np.float32)})
    first = Loader(source, global_batch_size=4, seed=0)
    (batch, position), *_ = itertools.islice(first, 1)
    source.arrays["x"][:] = 1
    assert not batch["x"].any()  # a batch is a copy
    with pytest.raises(ValueError, match="data"):
        Loader(source, global_batch_size=4, seed=0).starting_at(position)


def test_batches_own_their_memory():
    """A batch may be aliased by JAX, so neither the source nor a later batch may ever write into it."""

    class Views(ArraySource):
        def __getitems__(self, ids):
            return {name: array[: len(ids)] for name, array in self.arrays.items()}

    views = Views({"x": np.zeros((10, 4))})
    batches, _ = collect(Loader(views, global_batch_size=5, seed=0, num_epochs=1))
    views.arrays["x"][:] = 1
    assert not batches[0]["x"].any()
    assert not np.shares_memory(batches[0]["x"], batches[1]["x"])


@pytest.mark.parametrize("rows", [[-1], [3, 2], [1, 1], [8], []])
def test_impossible_rows_are_refused(rows):
    with pytest.raises(ValueError, match="ascending"):
        Loader(source_of(20), global_batch_size=8, seed=0, rows=np.array(rows, int))


class Doubled:
    """A class that users write over a source: its examples are twice those of the source."""

    def __getitem__(self, index):
        return {name: 2 * value for name, value in super().__getitem__(index).items()}


def subclassed_sources(folder):
    numbers = np.arange(12)
    np.save(folder / "tokens.npy", numbers)
    pq.write_table(pa.table({"x": numbers}), folder / "x.parquet")
    arrays = ArraySource({"x": numbers})
    return [
        type("Arrays", (Doubled, ArraySource), {})({"x": numbers}),
        type("Chosen", (Doubled, Subset), {})(arrays, numbers),
        Subset(type("Arrays", (Doubled, ArraySource), {})({"x": numbers}), numbers),
        type("Tokens", (Doubled, TokenSource), {})(folder / "tokens.npy", length=1),
        type("Rows", (Doubled, ParquetSource), {})(folder / "x.parquet"),
    ]


def test_a_subclass_that_defines_the_examples_alone_is_trained_on_as_it_defines_them(tmp_path):
    for source in subclassed_sources(tmp_path):
        batches, _ = collect(Loader(source, global_batch_size=4, seed=0, shuffle=False, num_epochs=1))
        found = np.concatenate([next(value for name, value in each.items() if name != MASK) for each in batches])
        np.testing.assert_array_equal(found.reshape(-1), 2 * np.arange(12), err_msg=type(source).__name__)


def test_a_subclass_that_defines_both_reads_batches():
    class Both(Doubled, ArraySource):
        def __getitems__(self, ids):
            return {name: 2 * value for name, value in super().__getitems__(ids).items()}

    assert reads_batches(Both({"x": np.arange(12)}))


class Placed:
    """A source of a user that keeps a folder and an array under names that sources of the package give to methods."""

    location, order = "/data/pictures", np.arange(5)[::-1]

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index == 3:
            raise KeyError("torn")
        return {"id": np.int32(index)}

    def fingerprint(self):
        return "placed"


@pytest.mark.parametrize("make", [Placed, lambda: Subset(Placed(), range(5))], ids=["itself", "subset"])
def test_a_location_or_order_that_is_no_method_hides_no_error_of_an_example(make):
    with pytest.raises(Exception, match=r"Example 3 \(epoch 0\).*torn"):
        collect(Loader(make(), global_batch_size=5, seed=0, num_epochs=1, shuffle=True))
