import itertools
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxdist.data import ArraySource, Loader, Subset, feed, process_rows
from jaxdist.data.assembly import ExampleError
from jaxdist.spmd.mesh import Dealing, DealtBatch


def make_mesh(**axes):
    shape = tuple(axes.values())
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(shape))


def source_of(num_examples):
    return ArraySource(
        {
            "id": np.arange(num_examples, dtype=np.int32),
            "x": np.random.default_rng(0).random((num_examples, 3), np.float32),
        }
    )


@pytest.mark.parametrize(
    ("mesh_axes", "axes"),
    [
        ({"data": 1}, ("data",)),
        ({"data": 8}, ("data",)),
        ({"data": 4, "model": 2}, ("data",)),
        ({"model": 2, "data": 4}, ("data",)),
        ({"data": 2, "fsdp": 4}, ("data", "fsdp")),
        ({"fsdp": 4, "data": 2}, ("data", "fsdp")),
        ({"replica": 2, "model": 2, "data": 2}, ("data",)),
    ],
)
def test_the_global_batch_is_the_host_batch_on_any_mesh(mesh_axes, axes):
    mesh = make_mesh(**mesh_axes)
    loader = Loader(source_of(20), global_batch_size=8, seed=3, num_epochs=1)
    expected = list(loader)
    found = list(feed(loader, mesh, axes))
    assert len(found) == len(expected) == 3
    for (batch, position), (host_batch, host_position) in zip(found, expected):
        assert position == host_position
        assert set(batch) == {"id", "x", "mask"}
        for name, array in batch.items():
            np.testing.assert_array_equal(array, host_batch[name])
            assert array.sharding.spec == jax.sharding.PartitionSpec(axes)
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, host_batch[name][shard.index])


@pytest.mark.parametrize(("num_devices", "logical_shards"), [(3, 8), (5, 8), (2, 3), (3, 4)])
def test_batches_are_dealt_where_the_devices_do_not_divide_the_logical_shards(num_devices, logical_shards):
    mesh, size = make_mesh(data=num_devices), 24 // logical_shards
    loader = Loader(source_of(40), global_batch_size=24, seed=3, num_epochs=1)
    dealing = Dealing(logical_shards, num_devices)
    for (batch, _), (host_batch, _) in zip(feed(loader, mesh, logical_shards=logical_shards), loader, strict=True):
        assert isinstance(batch, DealtBatch)
        assert batch.dealing == dealing
        for name, array in batch.items():
            slots = np.asarray(array).reshape(num_devices, dealing.num_slots, size, *array.shape[1:])
            for device, shards in zip(slots, dealing.slots(), strict=True):
                for rows, shard in zip(device, shards, strict=True):
                    np.testing.assert_array_equal(rows, host_batch[name][shard * size : (shard + 1) * size])


def test_batches_keep_their_order_where_the_devices_divide_the_logical_shards():
    loader = Loader(source_of(16), global_batch_size=8, seed=3, num_epochs=1)
    for (batch, _), (host_batch, _) in zip(feed(loader, make_mesh(data=2), logical_shards=8), loader, strict=True):
        assert not isinstance(batch, DealtBatch)
        np.testing.assert_array_equal(batch["x"], host_batch["x"])


def test_batches_keep_their_values_while_later_ones_are_read():
    loader = Loader(source_of(64), global_batch_size=8, seed=3, num_epochs=1)
    kept = [batch for batch, _ in feed(loader, make_mesh(data=2), prefetch=3)]
    for batch, (host_batch, _) in zip(kept, loader):
        np.testing.assert_array_equal(batch["x"], host_batch["x"])


def test_feed_reads_only_a_few_batches_ahead():
    read, wanted = [], 6
    enough = threading.Event()

    class Counting(ArraySource):
        def __getitems__(self, ids):
            read.append(len(ids))
            if len(read) >= wanted:
                enough.set()
            return super().__getitems__(ids)

    loader = Loader(Counting({"x": np.zeros((1000, 2))}), global_batch_size=4, seed=0, read_ahead=2, num_threads=1)
    batches = feed(loader, make_mesh(data=2), prefetch=3)
    next(batches)
    # One consumed, three placed, two read ahead of them: six batches were asked for, and no seventh can be.
    assert enough.wait(200)
    batches.close()
    assert len(read) == wanted


def test_small_batches_that_the_feed_makes_itself_are_placed_further_ahead():
    read, wanted = [], 17 + 1 + 2
    enough = threading.Event()

    class Counting(ArraySource):
        def __getitems__(self, ids):
            read.append(len(ids))
            if len(read) >= wanted:
                enough.set()
            return super().__getitems__(ids)

    batches = feed(Loader(Counting({"x": np.zeros((1000, 2))}), global_batch_size=4, seed=0), make_mesh(data=2))
    for _ in range(8):  # room is made for eight at once
        next(batches)
    assert enough.wait(200)
    batches.close()
    assert len(read) <= 8 + 16 + 1


def test_batches_with_the_same_mask_share_it_on_the_devices():
    loader = Loader(source_of(20), global_batch_size=8, seed=3, num_epochs=2)
    placed = [batch["mask"] for batch, _ in feed(loader, make_mesh(data=2))]
    assert [mask.sum() for mask in placed] == [8, 8, 4, 8, 8, 4]
    assert placed[0] is placed[1]
    assert placed[3] is placed[4]


def feed_threads():
    return [thread for thread in threading.enumerate() if thread.name == "jaxdist-feed"]


def test_tiny_batches_of_arrays_in_memory_are_placed_without_a_thread(tmp_path):
    x = np.arange(40.0, dtype=np.float32).reshape(20, 2)
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=x.dtype, shape=x.shape)
    mapped[:] = x
    sources = {"arrays": ArraySource({"x": x}), "file": ArraySource({"x": mapped})}
    sources["part"] = Subset(sources["arrays"], np.arange(19, -1, -1))
    before = set(feed_threads())
    for name, source in sources.items():
        batches = feed(Loader(source, global_batch_size=4, seed=0, shuffle=False), make_mesh(data=2))  # never ends
        rows = np.concatenate([np.asarray(batch["x"]) for batch, _ in itertools.islice(batches, 5)])
        np.testing.assert_array_equal(rows, x[::-1] if name == "part" else x)
        assert len(set(feed_threads()) - before) == (name == "file"), name
        batches.close()
    for settings in ({"batch_fn": lambda batch, random, rows: batch}, {"num_threads": 1}, {"timeout_seconds": 100}):
        batches = feed(Loader(sources["arrays"], global_batch_size=8, seed=0, **settings), make_mesh(data=2))
        next(batches)
        assert len(set(feed_threads()) - before) == 1, settings
        batches.close()


def test_a_number_that_devices_do_not_have_is_refused_in_its_turn():
    source = ArraySource({"x": np.where(np.arange(40) == 17, 2**40, 0)})
    batches = feed(Loader(source, global_batch_size=4, seed=0, shuffle=False), make_mesh(data=2))
    assert [next(batches)[1].position for _ in range(4)] == [4, 8, 12, 16]
    with pytest.raises(ExampleError, match="Field 'x' of example 17"):
        next(batches)


def test_closing_or_finishing_ends_every_thread():
    before = set(threading.enumerate())
    loader = Loader(source_of(200), global_batch_size=8, seed=0, example_fn=lambda e, r: e, num_threads=3)
    batches = feed(loader, make_mesh(data=2))
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    assert not set(threading.enumerate()) - before
    assert len(list(feed(Loader(source_of(16), global_batch_size=8, seed=0, num_epochs=1), make_mesh(data=2)))) == 2
    assert not set(threading.enumerate()) - before


def test_an_exception_arrives_after_the_batches_before_it():
    def fail_late(example, random):
        if example["id"] == 12:
            raise RuntimeError("example twelve")
        return example

    loader = Loader(source_of(40), global_batch_size=4, seed=0, shuffle=False, example_fn=fail_late)
    batches = feed(loader, make_mesh(data=2))
    assert [next(batches)[1].position for _ in range(3)] == [4, 8, 12]
    with pytest.raises(ExampleError, match=r"Example 12 \(epoch 0\): RuntimeError: example twelve"):
        next(batches)


def test_process_rows_are_all_rows_for_one_process():
    np.testing.assert_array_equal(process_rows(make_mesh(data=4, model=2), 8), np.arange(8))


def test_bad_settings_are_refused_before_reading():
    loader = Loader(source_of(20), global_batch_size=6, seed=0)
    with pytest.raises(ValueError, match="multiple of 4"):
        feed(loader, make_mesh(data=4))
    with pytest.raises(ValueError, match="mesh has"):
        feed(loader, make_mesh(data=2), axes=("batch",))
    with pytest.raises(ValueError, match="prefetch"):
        feed(loader, make_mesh(data=2), prefetch=0)
    with pytest.raises(ValueError, match="Leave the loader's"):
        feed(loader.with_rows(np.arange(3)), make_mesh(data=2))


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**32 + 5])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_number_that_would_wrap_on_the_devices_is_refused_by_field_example_and_value(value, shape):
    labels = np.zeros((20, *shape), np.int64)
    labels[13] = 7
    labels[(13, *shape[:0], *(2,) * len(shape))] = value
    loader = Loader(ArraySource({"label": labels}), global_batch_size=4, seed=0, shuffle=False, num_epochs=1)
    batches = feed(loader, make_mesh(data=2))
    with pytest.raises(ValueError, match=rf"'label' of example 13 holds {value}, but devices hold .* as int32"):
        list(batches)
    labels[13] = 2**31 - 1
    assert len(list(feed(loader, make_mesh(data=2)))) == 5


def test_unsigned_numbers_that_would_wrap_are_refused():
    source = ArraySource({"id": np.array([1, 2**32], np.uint64)})
    loader = Loader(source, global_batch_size=2, seed=0, shuffle=False, num_epochs=1)
    with pytest.raises(ValueError, match=r"example 1 holds 4294967296, .* as uint32, from 0 to 4294967295"):
        list(feed(loader, make_mesh(data=1)))


def test_a_float_that_would_become_infinite_is_refused_and_infinity_is_not():
    values = np.array([1.0, -np.inf, np.nan, -1e39])
    loader = Loader(ArraySource({"x": values}), global_batch_size=4, seed=0, shuffle=False, num_epochs=1)
    with pytest.raises(ValueError, match=r"'x' of example 3 holds -1e\+39, .* float32, up to 3.4e\+38"):
        list(feed(loader, make_mesh(data=1)))
    values[3] = 3e38
    ((batch, _),) = feed(loader, make_mesh(data=1))
    np.testing.assert_array_equal(batch["x"], values.astype(np.float32))


LEFT_IN_THE_MIDDLE = """
import atexit, threading
import jax, numpy as np
from jaxdist.data import ArraySource, Loader, feed

atexit.register(lambda: print(*(thread.name for thread in threading.enumerate())))
loader = Loader(ArraySource({"x": np.zeros((64, 3), np.float32)}), global_batch_size=4, seed=0, num_threads=2)
mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
batches, examples = iter(feed(loader, mesh)), iter(loader)
next(batches), next(examples)
raise KeyError("mine")
"""


def test_a_script_that_ends_within_an_iteration_ends():
    """What holds an iterator then, such as an error's traceback, is dropped when Python has stopped the threads."""
    ended = subprocess.run([sys.executable, "-c", LEFT_IN_THE_MIDDLE], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.endswith("KeyError: 'mine'\n")
    assert "jaxdist-feed" not in ended.stdout  # Python stops no thread that may be in JAX
