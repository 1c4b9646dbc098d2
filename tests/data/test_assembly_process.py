"""What a worker process is sent and shares: recipes as bytes, slots of memory, reports."""

import importlib.util
import multiprocessing
import os
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.data import ArraySource, CorruptExample, Loader
from jaxdist.data.assembly_process import ArrayPlace, MadeRows, Slot, Task, Trouble, dump_recipe, load_recipe
from jaxdist.data.assembly_process import run_assembly_process as run

SOURCE = ArraySource({"id": np.arange(40)})


def load(source, **settings):
    return list(Loader(source, **{"global_batch_size": 8, "seed": 0, "num_epochs": 1, **settings}))


@pytest.fixture
def slot_file():
    fd = os.memfd_create("slot")
    yield fd
    os.close(fd)


@given(sizes=st.lists(st.integers(0, 20_000), min_size=1, max_size=8))
def test_two_views_of_a_slot_are_one_memory_which_only_grows(sizes):
    fd = os.memfd_create("slot")
    ours, theirs = Slot(fd), Slot(os.dup(fd))
    largest = 0
    for number, size in enumerate(sizes):
        place = ArrayPlace((size,), np.dtype(np.int16), 128)
        ours.reserve(128 + 2 * size)
        largest = max(largest, 128 + 2 * size)
        ours.view(place)[...] = number
        assert (theirs.view(place) == number).all()
        assert theirs.view(place).shape == (size,)
        assert os.fstat(fd).st_size == largest


class Detachable:
    def __init__(self, fd):
        self.fd = os.dup(fd)

    def detach(self):
        return self.fd


def fail_at_3(example, random):
    if example["id"] == 3:
        raise KeyError("no such thing")
    return {"id": example["id"], "twice": np.full((2,), 2 * example["id"], np.int8)}


def corrupt_at_3(example, random):
    if example["id"] == 3:
        raise CorruptExample("file-3.png")
    return example


@pytest.fixture
def worker(slot_file, monkeypatch):
    """Start the main function of a worker in a thread; return a function that hands it one task."""
    monkeypatch.setattr("jaxdist.data.assembly_process.signal.signal", lambda *_: None)
    monkeypatch.setattr("jaxdist.data.assembly_process._end_with_parent", lambda: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    current = os.memfd_create("current")
    os.ftruncate(current, 24)
    connections, threads = [], []

    def start(payload):
        ours, theirs = multiprocessing.Pipe()
        connections.append(ours)
        arguments = (theirs, [Detachable(slot_file)], Detachable(current), payload)
        threads.append(threading.Thread(target=run, args=arguments))
        threads[-1].start()
        return ours

    yield start
    for connection in connections:
        connection.close()
    for thread in threads:
        thread.join(timeout=200)
        assert not thread.is_alive()
    os.close(current)


def test_rows_are_stored_where_the_report_says(worker, slot_file):
    recipe = Loader(SOURCE, global_batch_size=4, seed=0, example_fn=fail_at_3).recipe
    connection = worker(dump_recipe(recipe))
    connection.send(Task(0, 0, np.array([5, 7])))
    report = connection.recv()
    assert isinstance(report, MadeRows)
    found = {name: Slot(os.dup(slot_file)).view(place) for name, place in report.places.items()}
    assert found["id"].tolist() == [5, 7]
    assert found["twice"].tolist() == [[10, 10], [14, 14]]
    assert all(place.offset % 64 == 0 for place in report.places.values())


@pytest.mark.parametrize(("example_fn", "corrupt"), [(fail_at_3, False), (corrupt_at_3, True)])
def test_an_example_that_fails_is_reported_and_the_worker_continues(worker, example_fn, corrupt):
    connection = worker(dump_recipe(Loader(SOURCE, global_batch_size=4, seed=0, example_fn=example_fn).recipe))
    connection.send(Task(0, 2, np.array([1, 3])))
    report = connection.recv()
    assert isinstance(report, Trouble)
    assert "Example 3 (epoch 2)" in report.message
    assert report.corrupt is corrupt
    assert example_fn.__name__ in report.trace
    connection.send(Task(0, 2, np.array([1])))
    assert isinstance(connection.recv(), MadeRows)


def test_a_worker_that_cannot_begin_says_so(worker):
    report = worker(b"no pickle").recv()
    assert isinstance(report, Trouble)
    assert "could not start" in report.message


def test_what_cannot_be_sent_to_a_worker_is_refused():
    with pytest.raises(ValueError, match="top level of a module"):
        load(SOURCE, example_fn=lambda example, random: example, num_workers=1)


def test_functions_of_a_file_that_is_no_module_reach_the_worker(tmp_path):
    """An experiment is loaded from its path, and cannot be imported by its name."""
    (tmp_path / "helper_of_it.py").write_text("TWO = 2\n")
    path = tmp_path / "an_experiment.py"
    path.write_text(
        "from helper_of_it import TWO\n\ndef double(example, random):\n    return {'id': example['id'] * TWO}\n"
    )
    spec = importlib.util.spec_from_file_location("an_experiment", path)
    module = sys.modules["an_experiment"] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(tmp_path))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(tmp_path))
    for name in ("an_experiment", "helper_of_it"):
        assert name in sys.modules
    batches = load(SOURCE, example_fn=module.double, num_workers=1, shuffle=False)
    assert batches[0].batch["id"].tolist() == list(range(0, 16, 2))
    recipe = Loader(SOURCE, global_batch_size=4, seed=0, example_fn=module.double).recipe
    assert load_recipe(dump_recipe(recipe)).example_fn is not module.double
    for name in ("an_experiment", "helper_of_it"):
        del sys.modules[name]
    sys.path.remove(str(tmp_path))
