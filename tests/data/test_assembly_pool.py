"""Worker processes: the same batches as threads, and a clean end in every case."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxdist.data import ArraySource, CorruptExample, Loader, Subset
from jaxdist.data.assembly import BadExampleError, ExampleError, ExampleTimeout
from jaxdist.data.assembly_pool import AssemblyProcessDied, how_it_ended

SOURCE = ArraySource({"id": np.arange(40)})


def jitter(example, random):
    """Rows grow with the size of the epoch's first ids, so that slots must grow, too."""
    return {"id": example["id"], "noise": random.random((3, 50))}


def fail_at_17(example, random):
    if example["id"] == 17:
        raise KeyError("no such thing")
    return example


def corrupt_thirds(example, random):
    if example["id"] % 3 == 0:
        raise CorruptExample(f"file-{example['id']}.png")
    return example


def die_at_17(example, random):
    if example["id"] == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return example


class Growing:
    """Example i has i // 8 + 1 elements, so each batch is larger than the one before."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"x": np.full((index // 8 + 1) * 3000, index, np.int32)}

    def fingerprint(self):
        return "growing"


def load(source, **settings):
    return list(Loader(source, **{"global_batch_size": 8, "seed": 0, "num_epochs": 1, **settings}))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for (batch, position), (other, other_position) in zip(ours, theirs):
        assert position == other_position
        assert set(batch) == set(other)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name])
            assert array.flags.owndata  # a view of a slot would change under JAX


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_make_the_batches_of_threads(num_workers):
    settings = {"example_fn": jitter, "global_batch_size": 7, "num_epochs": 2}
    assert_same(load(SOURCE, num_workers=num_workers, **settings), load(SOURCE, num_threads=0, **settings))


def test_sources_that_read_whole_batches_and_batches_that_grow():
    assert_same(load(SOURCE, num_workers=1), load(SOURCE))
    assert_same(load(Growing(), num_workers=2, shuffle=False), load(Growing(), shuffle=False))


def test_an_exception_in_a_worker_names_the_example_and_ends_all_workers():
    loader = Loader(SOURCE, global_batch_size=8, seed=0, shuffle=False, example_fn=fail_at_17, num_workers=2)
    batches = iter(loader)
    assert [next(batches).position.position for _ in range(2)] == [8, 16]
    with pytest.raises(ExampleError, match=r"Example 17 \(epoch 0\): KeyError: 'no such thing'") as caught:
        next(batches)
    assert "fail_at_17" in caught.value.__notes__[0]


def test_a_killed_worker_is_noticed_at_once_and_its_example_named():
    loader = Loader(SOURCE, global_batch_size=8, seed=0, shuffle=False, example_fn=die_at_17, num_workers=2)
    with pytest.raises(AssemblyProcessDied, match=r"was killed by signal 9 while making example 17 \(epoch 0\)"):
        list(loader)


@pytest.mark.parametrize("settings", [{"num_threads": 2}, {"num_threads": 0}, {"num_workers": 2}], ids=str)
def test_bad_examples_are_skipped_counted_and_named(settings, caplog):
    loader = Loader(
        SOURCE, global_batch_size=8, seed=0, num_epochs=1, example_fn=corrupt_thirds, on_bad="skip", **settings
    )
    batches = [batch for batch, _ in loader]
    ids = np.concatenate([batch["id"][batch["mask"] == 1] for batch in batches])
    assert sorted(ids) == [i for i in range(40) if i % 3]
    assert not np.concatenate([batch["id"][batch["mask"] == 0] for batch in batches]).any()
    assert len(loader.skipped) == len(caplog.records) == 14
    assert any("file-9.png" in message for message in loader.skipped)
    with pytest.raises(BadExampleError, match=r"Example \d+ \(epoch 0\): file-\d+\.png"):
        load(SOURCE, example_fn=corrupt_thirds, **settings)


def test_only_corrupt_examples_are_skipped():
    with pytest.raises(ExampleError, match="KeyError") as caught:
        load(SOURCE, example_fn=fail_at_17, on_bad="skip", num_threads=0)
    assert not isinstance(caught.value, BadExampleError)
    with pytest.raises(ValueError, match="on_bad"):
        Loader(SOURCE, global_batch_size=4, seed=0, on_bad="ignore")


TRAINER = """
import multiprocessing, time, numpy as np
from jaxdist.data import ArraySource, Loader
from test_assembly_pool import slow

if __name__ == "__main__":
    source = ArraySource({"id": np.arange(1000)})
    batches = iter(Loader(source, global_batch_size=4, seed=0, example_fn=slow, num_workers=2))
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    while True:
        next(batches)
"""


def slow(example, random):
    time.sleep(0.01)
    return {"x": np.zeros(10**5) + example["id"]}


def is_alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="reads the state of processes from /proc")
def test_nothing_is_alive_and_no_memory_is_left_after_the_trainer_was_killed(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 2
        group = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent_of(pid) == trainer.pid]
        assert set(pids) <= set(group)
        # Only what this trainer uses is looked at: other programs' shared memory comes and goes.
        used = {name for pid in [trainer.pid, *group] for name in shared_memory(pid)}
        trainer.kill()
        deadline = time.monotonic() + 200
        while any(map(is_alive, group)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [pid for pid in group if is_alive(pid)]
    assert not used & set(os.listdir("/dev/shm"))


ENDS = """
import multiprocessing, numpy as np
from jaxdist.data import ArraySource, Loader

def same(example, random):
    return example

if __name__ == "__main__":
    source = ArraySource({"id": np.arange(8)})
    kept = Loader(source, global_batch_size=4, seed=0, num_epochs=1, example_fn=same, num_workers=1)
    assert len(list(kept)) == 2
    batches = iter(Loader(source, global_batch_size=4, seed=0, example_fn=same, num_workers=1))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    raise SystemExit(3)
"""


def test_a_script_ends_within_an_iteration_and_with_workers_that_are_kept(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (3, "")


def shared_memory(pid):
    """Return the names in /dev/shm that a process has open or mapped."""
    links = [os.readlink(link) for link in pathlib.Path(f"/proc/{pid}/fd").iterdir()]
    mapped = [line.split()[-1] for line in pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {path.removeprefix("/dev/shm/") for path in links + mapped if path.startswith("/dev/shm/")}


def parent_of(pid):
    try:
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def corrupt_first_half(example, random):
    if example["id"] < 20:
        raise CorruptExample(f"file-{example['id']}.png")
    return {"x": np.full((2, 3), example["id"], np.int16)}


@pytest.mark.parametrize("settings", [{"num_threads": 2}, {"num_threads": 0}, {"num_workers": 2}], ids=str)
def test_whole_batches_of_bad_examples_are_skipped(settings):
    settings = {"example_fn": corrupt_first_half, "on_bad": "skip", "shuffle": False, **settings}
    batches = load(SOURCE, **settings)
    assert [batch["mask"].sum() for batch, _ in batches] == [0, 0, 4, 8, 8]
    assert {(batch["x"].shape, batch["x"].dtype) for batch, _ in batches} == {((8, 2, 3), np.dtype(np.int16))}
    assert not batches[0].batch["x"].any()
    (batch,) = {batch["x"].shape for batch, _ in load(SOURCE, rows=np.arange(4), **settings)}
    assert batch == (4, 2, 3)
    assert Loader(SOURCE, global_batch_size=8, seed=0, **settings).first_example()["x"].shape == (1, 2, 3)


def test_where_every_example_is_bad_the_run_ends():
    settings = {"example_fn": always_corrupt, "on_bad": "skip", "num_threads": 0}
    with pytest.raises(ExampleError, match="No example of the whole data set can be read"):
        load(SOURCE, **settings)


def always_corrupt(example, random):
    raise CorruptExample("nothing")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "ended with status 3"),
        (-signal.SIGKILL, "memory ran out"),
        (-signal.SIGBUS, "/dev/shm is full"),
        (-signal.SIGSEGV, "Native code crashed"),
        (-signal.SIGUSR1, "sent by another process"),
    ],
)
def test_the_end_of_a_worker_is_explained(code, words):
    message = how_it_ended(code, "while idle")
    assert words in message
    assert ("memory" in message) == (code == -signal.SIGKILL)


NEVER = threading.Event()


def hang_at_17(example, random):
    if example["id"] == 17:
        NEVER.wait()
    return example


class HangingSource(ArraySource):
    """Whole batches of which the second never comes."""

    def __getitems__(self, ids):
        if 17 in ids:
            NEVER.wait()
        return super().__getitems__(ids)


@pytest.mark.parametrize("settings", [{"num_threads": 0}, {"num_threads": 2}, {"num_workers": 2}], ids=str)
def test_an_example_that_hangs_ends_the_iteration_and_is_named(settings):
    before = set(threading.enumerate())
    expected = r"Example 17 \(epoch 0\) was not ready within 1 s.* raise data.timeout_seconds"
    loader = Loader(
        SOURCE,
        **{"global_batch_size": 8, "seed": 0, "num_epochs": 1, "shuffle": False, "timeout_seconds": 1.0, **settings},
        example_fn=hang_at_17,
    )
    made = iter(loader)
    seen = [next(made).batch["id"].tolist() for _ in range(2)]
    assert seen == [list(range(8)), list(range(8, 16))]
    with pytest.raises(ExampleTimeout, match=expected):
        next(made)
    assert all(thread.daemon for thread in set(threading.enumerate()) - before), "a hanging one keeps no process alive"


def test_a_whole_batch_that_hangs_is_named_by_its_first_example():
    source = HangingSource({"id": np.arange(40)})
    with pytest.raises(ExampleTimeout, match="Example 16 "):
        load(source, shuffle=False, timeout_seconds=1.0)
    loader = Loader(Subset(source, [17] * 8), global_batch_size=8, seed=0, shuffle=False, timeout_seconds=1.0)
    with pytest.raises(ExampleTimeout, match=r"Example 0 \(epoch 0\), example 17 of the whole, was not ready"):
        loader.first_example()


def test_slow_examples_within_the_limit_are_waited_for():
    """Each takes a small part of the limit, a batch longer than it."""

    def slow(example, random):
        NEVER.wait(0.15)
        return example

    source = Subset(SOURCE, list(range(8)))
    assert len(load(source, example_fn=slow, timeout_seconds=1.0, num_threads=1)) == 1


@pytest.mark.parametrize("seconds", [0, float("inf"), float("nan")])
def test_a_limit_must_be_finite_and_above_zero(seconds):
    with pytest.raises(ValueError, match="timeout_seconds is finite and above 0, or None"):
        Loader(SOURCE, global_batch_size=8, seed=0, timeout_seconds=seconds)
