"""Streams through the loader: exactly once under stops and resizes, and what each kind of stream promises."""

import collections
import pickle
import threading

import hypothesis
import numpy as np
import PIL.Image
import pytest
from hypothesis import strategies as st

from jaxdist import data
from jaxdist.data import fingerprints


class Shards:
    """Shards of numbers, shard s from 1000 s on; counts what is opened and read."""

    def __init__(self, sizes, seeks=False):
        self.sizes, self.seeks = tuple(sizes), seeks
        self.opened, self.read = [], collections.Counter()

    def __call__(self, shard, start=0):
        self.opened.append((shard, start))
        for number in range(start, self.sizes[shard]):
            self.read[shard, number] += 1
            yield {"x": np.int32(1000 * shard + number)}

    @property
    def all(self):
        return [1000 * shard + number for shard, size in enumerate(self.sizes) for number in range(size)]


def sized(shards, **settings):
    return data.StreamSource(shards, num_shards=len(shards.sizes), sizes=shards.sizes, seeks=shards.seeks, **settings)


def endless(shards, examples_per_epoch, **settings):
    return data.StreamSource(
        shards, num_shards=len(shards.sizes), examples_per_epoch=examples_per_epoch, seeks=shards.seeks, **settings
    )


def rows_of(process, num_processes, size):
    return np.array_split(np.arange(size), num_processes)[process]


def steps(make_stream, *, start, num_processes, size, num_steps):
    """Return the numbers that some processes read together in each step, and the position after the last one."""
    loaders = [
        data.Loader(make_stream(), global_batch_size=size, seed=3, start=start, num_threads=0, rows=rows)
        for rows in (rows_of(process, num_processes, size) for process in range(num_processes))
    ]
    seen, position = [], start
    for made in zip(*map(iter, loaders), range(num_steps)):
        batches = made[:-1]
        assert len({each.position for each in batches}) == 1
        position = batches[0].position
        seen.append([int(x) for each in batches for x, true in zip(each.batch["x"], each.batch["mask"]) if true])
    return seen, position


shard_sizes = st.lists(st.integers(0, 25), min_size=1, max_size=7).filter(lambda sizes: sum(sizes) >= 8)
stretches = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=8)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(shard_sizes, st.integers(1, 6), st.integers(1, 12), st.booleans(), stretches)
def test_each_example_once_an_epoch_through_stops_on_any_number_of_processes(sizes, lanes, window, seeks, stretches):
    """Each stretch is a start of the job: so many processes, so many steps; nothing is carried but the position."""
    position, seen = None, []
    for num_processes, num_steps in stretches:
        found, position = steps(
            lambda: sized(Shards(sizes, seeks), lanes=lanes, window=window),
            start=position,
            num_processes=num_processes,
            size=4 + 4 * (num_steps % 2),
            num_steps=num_steps,
        )
        seen += [x for step in found for x in step]
    whole, rest = divmod(len(seen), sum(sizes))
    everything = sorted(Shards(sizes).all)
    for epoch in range(whole):
        assert sorted(seen[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]) == everything
    assert len(set(seen[whole * sum(sizes) :])) == rest
    assert (position.epoch, position.position) in {(whole, rest), (whole - 1, sum(sizes))}


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 9), st.booleans(), stretches
)
def test_a_stream_of_unknown_size_has_one_sequence_whatever_stops_it(sizes, lanes, window, seeks, stretches):
    lanes = min(lanes, len(sizes))

    def make():
        return endless(Shards(sizes, seeks), 13, lanes=lanes, window=window)

    position, found = None, []
    for num_processes, num_steps in stretches:
        some, position = steps(make, start=position, num_processes=num_processes, size=4, num_steps=num_steps)
        found += some
    undisturbed, _ = steps(make, start=None, num_processes=1, size=4, num_steps=len(found))
    assert found == undisturbed


def test_one_lane_of_unknown_size_is_pass_after_pass():
    sizes = (5, 0, 7, 3)
    seen, _ = steps(
        lambda: endless(Shards(sizes), 10, lanes=1, window=1), start=None, num_processes=1, size=5, num_steps=12
    )
    numbers = [x for step in seen for x in step]
    for number in range(4):
        assert sorted(numbers[15 * number : 15 * number + 15]) == Shards(sizes).all


def test_an_epoch_reads_each_example_about_once_and_a_resume_seeks():
    shards = Shards([3000] * 4, seeks=True)
    loader = data.Loader(sized(shards, window=64), global_batch_size=200, seed=0, num_epochs=1)
    positions = [position for _, position in loader]
    assert sum(shards.read.values()) <= 12000 + 4 * 16
    resumed = Shards([3000] * 4, seeks=True)
    again = data.Loader(sized(resumed, window=64), global_batch_size=200, seed=0, start=positions[-2], num_epochs=1)
    assert len(list(again)) == 1
    assert sum(resumed.read.values()) < 200 + 4 * 2 * 16, "it opened the shards where it stopped"


def test_two_processes_read_shards_of_their_own():
    sizes, read = [300] * 8, []
    for process in range(2):
        shards = Shards(sizes)
        rows = rows_of(process, 2, 16)
        loader = data.Loader(sized(shards, window=64), global_batch_size=16, seed=0, num_epochs=1, rows=rows)
        assert len(list(loader)) == 150
        read.append(sum(shards.read.values()))
    assert max(read) <= 1200 + 10 + 16, "half of the examples each, and none of the other's"


def test_memory_is_bounded_by_the_window():
    shards = Shards([20_000])
    stream = sized(shards, window=16)
    for _ in data.Loader(stream, global_batch_size=100, seed=0, num_epochs=1, num_threads=0):
        assert len(stream._reader._kept._examples) <= 2 * 16 + 1024


def test_any_example_is_right_in_any_order_and_from_any_thread():
    stream = sized(Shards([50, 60, 70]), window=8)
    expected = Shards([50, 60, 70]).all
    wrong = []

    def ask(seed):
        asked = np.random.default_rng(seed).permutation(180).tolist()
        wrong.extend(index for index in asked if int(stream[index]["x"]) != expected[index])

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert int(pickle.loads(pickle.dumps(data.StreamSource(two_numbers, sizes=2)))[1]["x"]) == 1


def two_numbers(shard):
    return [{"x": 0}, {"x": 1}]


def test_without_shuffling_the_order_is_the_sources():
    loader = data.Loader(sized(Shards([4, 3])), global_batch_size=3, seed=0, shuffle=False, num_epochs=1)
    assert [int(x) for batch, _ in loader for x in batch["x"][batch["mask"] == 1]] == [0, 1, 2, 3, 1000, 1001, 1002]


@pytest.mark.parametrize("declared", [9, 11])
def test_a_wrong_size_is_named_and_nothing_is_lost_without_a_word(declared):
    stream = data.StreamSource(Shards([10]), sizes=declared, shard_names=["logs/a"])
    with pytest.raises(ValueError, match=rf"logs/a has (10|more than 9) examples, and sizes says {declared}"):
        for _ in data.Loader(stream, global_batch_size=1, seed=0, num_epochs=1):
            pass


def test_the_promise_is_stated():
    assert sized(Shards([3, 4])).promise == ""
    assert "passes over its examples follow each other" in endless(Shards([3]), 5).promise
    assert "exactly once does not hold" in endless(Shards([3, 4]), 5).promise
    changing = data.StreamSource(lambda shard: iter(()), sizes=5, repeats=False)
    assert "examples may be lost or come twice" in changing.promise


def test_a_stream_is_fingerprinted_by_its_first_examples_and_its_shape():
    def make(sizes=(3, 4), offset=0, **settings):
        return data.StreamSource(
            lambda shard: ({"x": offset + i} for i in range(9)), num_shards=len(sizes), sizes=sizes, **settings
        )

    prints = [make(), make(sizes=(4, 3)), make(offset=1), make(fingerprint="v1"), make(fingerprint="v2")]
    assert len({each.fingerprint() for each in prints}) == 5
    assert make().fingerprint() == make().fingerprint()
    texts = data.StreamSource(lambda shard: [{"text": "a"}, {"text": {"b": [1, None]}}], sizes=2)
    assert texts.fingerprint().startswith("stream:")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Got neither"),
        ({"sizes": 3, "examples_per_epoch": 3}, "Got both"),
        ({"sizes": [1, 2]}, "each of the 1 shards.*got \\[1, 2\\]"),
        ({"sizes": [0]}, "not all of them 0"),
        ({"num_shards": 0, "sizes": []}, "num_shards is a whole number of at least 1; got 0"),
        ({"examples_per_epoch": 4, "lanes": 2}, "needs a shard of its own: there are 1; got lanes=2"),
        ({"examples_per_epoch": 0}, "examples_per_epoch is a whole number of at least 1"),
        ({"sizes": 3, "window": 0}, "window is a whole number"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        data.StreamSource(two_numbers, **settings)


def test_what_would_read_a_stream_in_vain_is_refused():
    def loader(**settings):
        return data.Loader(sized(Shards([9])), global_batch_size=3, seed=0, **settings)

    with pytest.raises(ValueError, match="read forward, in the order of its own lanes and window; got BlockShuffled"):
        loader(shuffle=data.BlockShuffled(3))
    with pytest.raises(ValueError, match=r"got num_workers=2\. Use num_threads"):
        loader(num_workers=2)
    filtered = data.Filtered(sized(Shards([9])), lambda example: example["x"] % 2 == 0, version="1")
    with pytest.raises(ValueError, match="read forward"):
        data.Loader(filtered, global_batch_size=3, seed=0, shuffle=data.Shuffled())
    batches = list(data.Loader(filtered, global_batch_size=3, seed=0, num_epochs=1))
    assert sorted(int(x) for batch, _ in batches for x in batch["x"][batch["mask"] == 1]) == [0, 2, 4, 6, 8]


def test_examples_without_names_or_of_another_kind_are_refused():
    assert data.StreamSource(lambda shard: [(1, 2)], sizes=1, names=("x", "y"))[0] == {"x": 1, "y": 2}
    with pytest.raises(ValueError, match="have 2 values without names"):
        data.StreamSource(lambda shard: [(1, 2)], sizes=1)[0]
    with pytest.raises(ValueError, match="returned an object of NoneType"):
        data.StreamSource(lambda shard: None, sizes=1)[0]


def test_an_error_in_the_stream_names_the_shard():
    def failing(shard):
        yield {"x": 0}
        raise OSError("the disk is gone")

    stream = data.StreamSource(failing, sizes=3, shard_names=["logs/a"], fingerprint="v1")
    with pytest.raises(ValueError, match=r"logs/a, number \d of it: OSError: the disk is gone"):
        list(data.Loader(stream, global_batch_size=1, seed=0, num_epochs=1))
    with pytest.raises(ValueError, match="logs/a cannot be read: OSError: the disk is gone"):
        data.StreamSource(failing, sizes=3, shard_names=["logs/a"]).fingerprint()


def two_epochs_of(open_shard, **settings):
    stream = data.StreamSource(open_shard, window=3, **settings)
    return list(data.Loader(stream, global_batch_size=100, seed=0, num_epochs=2))


@pytest.mark.parametrize("kind", ["array", "tuple", "list", "bytes", "view", "image", "deque"])
def test_a_reader_may_fill_one_buffer_again_and_again(kind):
    def open_shard(shard):
        array, buffer, numbers = np.zeros(2, np.int32), bytearray(1), [0]
        image, frames = PIL.Image.new("L", (1, 1)), collections.deque([0], maxlen=1)
        for number in range(6):
            array[:], buffer[0], numbers[0] = number, number, number
            image.paste(number, (0, 0, 1, 1))
            frames.append(number)
            yield {
                "array": {"x": array},
                "tuple": (array,),
                "list": {"x": numbers},
                "bytes": {"x": buffer},
                "view": {"x": memoryview(buffer)},
                "image": {"x": image},
                "deque": {"x": frames},
            }[kind]

    fn = (lambda example, random: {"x": np.frombuffer(example["x"], np.uint8)}) if kind in ("bytes", "view") else None
    stream = data.StreamSource(open_shard, sizes=6, window=3, names=("x",) if kind == "tuple" else ())
    loader = data.Loader(stream, global_batch_size=2, seed=0, num_epochs=1, example_fn=fn)
    assert sorted(np.ravel(value)[0] for batch, _ in loader for value in batch["x"]) == list(range(6))


def test_a_stream_whose_shards_begin_otherwise_each_time_is_refused():
    random = np.random.default_rng(0)

    def open_shard(shard):
        return ({"x": x} for x in random.integers(0, 2**40, 2000))

    with pytest.raises(ValueError, match=r"shard 0 begins with another example than the last time.*repeats=False"):
        two_epochs_of(open_shard, sizes=2000)
    two_epochs_of(open_shard, sizes=2000, repeats=False)


def test_an_iterator_that_is_used_up_is_refused():
    numbers = ({"x": x} for x in range(2000))
    with pytest.raises(ValueError, match=r"open_shard\(0\) returned the iterator that it had returned before"):
        two_epochs_of(lambda shard: numbers, examples_per_epoch=1600)


@pytest.mark.parametrize("sizes", [(1, 3), (0, 5), (2, 0, 7), (1, 1, 1, 1), (3, 9)])
def test_a_seek_is_tried_in_a_shard_that_has_two_examples_wherever_it_is(sizes):
    def seeking(shard, start):
        return ({"x": 10 * shard + number} for number in range(start, sizes[shard]))

    stream = data.StreamSource(seeking, num_shards=len(sizes), sizes=sizes, seeks=True)
    loader = data.Loader(stream, global_batch_size=1, seed=0, num_epochs=1)
    found = sorted(int(batch["x"][0]) for batch, _ in loader)
    assert found == [10 * shard + number for shard, size in enumerate(sizes) for number in range(size)]
    if max(sizes) > 1:
        ignoring = data.StreamSource(lambda shard, _: seeking(shard, 0), num_shards=len(sizes), sizes=sizes, seeks=True)
        with pytest.raises(ValueError, match="opened at number 1 does not begin with the second"):
            ignoring.fingerprint()


def test_a_seek_that_does_not_seek_is_refused_at_the_start():
    def from_its_beginning(shard, start):
        return ({"x": x} for x in range(6))

    with pytest.raises(ValueError, match=r"shard 0 opened at number 1 does not begin with the second"):
        data.StreamSource(from_its_beginning, sizes=6, seeks=True).fingerprint()


@pytest.mark.parametrize("sizes", [2.0, True, "ab", [2.5], [True]])
def test_sizes_that_are_no_whole_numbers_are_refused(sizes):
    with pytest.raises(ValueError, match="sizes has the number of examples of each of the 1 shards"):
        data.StreamSource(lambda shard: [], sizes=sizes)


@pytest.mark.parametrize("make", [lambda s: data.Concatenated([s, s]), lambda s: data.Subset(s, [1, 0])])
def test_streams_inside_other_sources_are_read_in_sequence_only(make):
    source = make(data.StreamSource(lambda shard: [{"x": x} for x in range(6)], sizes=6))
    with pytest.raises(ValueError, match=r"A stream is read forward, and (Concatenated|Subset) would ask"):
        data.Loader(source, global_batch_size=2, seed=0)
    assert list(data.Loader(source, global_batch_size=2, seed=0, shuffle=False, num_epochs=1))


def test_the_fingerprint_is_of_examples_of_several_shards_and_a_strict_one_of_all():
    def stream(changed=(0, 0), **settings):
        def open_shard(shard):
            return [{"x": np.array(100 * shard + i + 0.5 * ((shard, i) == changed)), "t": "a"} for i in range(1, 9)]

        return data.StreamSource(open_shard, num_shards=3, sizes=[8] * 3, **settings)

    plain, strict = stream().fingerprint(), fingerprints.strict_fingerprint(stream())
    assert stream().fingerprint() == plain
    assert fingerprints.strict_fingerprint(stream()) == strict
    assert stream((2, 3)).fingerprint() != plain
    assert stream((2, 7)).fingerprint() == plain, "beyond the examples that are read at the start"
    assert fingerprints.strict_fingerprint(stream((2, 7))) != strict


def test_a_strict_fingerprint_of_a_stream_that_differs_says_that_it_cannot_be(caplog):
    random = np.random.default_rng(0)
    stream = data.StreamSource(lambda shard: [{"x": random.random()}] * 4, sizes=4, repeats=False)
    assert fingerprints.strict_fingerprint(stream) == fingerprints.strict_fingerprint(stream)
    assert "--strict cannot compare the contents of a stream that differs" in caplog.text
