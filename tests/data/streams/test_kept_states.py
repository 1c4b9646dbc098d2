import pathlib
import pickle

import pytest

from jaxdist import data
from jaxdist.data.streams import iterables
from jaxdist.data.streams.kept_states import KeptState, KeptStates


class Stateful:
    """A data set in the manner of Hugging Face's, which says where it is and counts what it reads."""

    def __init__(self, files, read, buffer=0):
        self.files, self.num_shards, self.read, self.buffer, self.place = files, len(files), read, buffer, 0

    def shard(self, num_shards, index):
        assert num_shards == len(self.files)
        return Stateful([self.files[index]], self.read, self.buffer)

    def skip(self, count):
        raise AssertionError("states are used in its place")

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]

    def __iter__(self):
        examples = [x for file in self.files for x in file]
        while self.place < len(examples):
            self.read.append(examples[self.place])
            self.place += 1
            # A shuffle buffer that a state does not hold: what comes is not what would have come.
            yield {"x": examples[(self.place - 1 + (self.buffer and len(self.read))) % len(examples)]}


FILES = [list(range(1000 * shard, 1000 * shard + 100)) for shard in range(2)]


@pytest.fixture
def stream(monkeypatch, tmp_path):
    monkeypatch.setattr(iterables, "STATE_EVERY", 10)

    def make(buffer=0, read=None, files=FILES):
        dataset = Stateful(files, [] if read is None else read, buffer)
        return data.hugging_face_stream(dataset, sizes=[100, 100], window=2, sizes_folder=tmp_path)

    return make


@pytest.mark.parametrize("start", [9, 10, 11, 55, 97, 100])
def test_a_place_is_continued_from_the_state_before_it_and_nothing_before_that_is_read(stream, start):
    assert [example["x"] for example in stream().open_at(1, 0)] == FILES[1]  # which notes states
    read = []
    again = pickle.loads(pickle.dumps(stream()))
    again._open_shard._dataset.read = read
    assert [example["x"] for example in again.open_at(1, start)] == FILES[1][start:]
    first = min(start // 10 * 10, 90)  # after which eight examples follow
    assert read[:2] == [0, 1000 + first], "one example names the data set"


def test_states_of_other_data_and_of_a_shuffle_buffer_are_not_used(stream):
    list(stream().open_at(0, 0))
    changed = [[*FILES[0][:30], -1, *FILES[0][31:]], FILES[1]]
    other = stream(files=changed)
    assert [example["x"] for example in other.open_at(0, 25)] == changed[0][25:], "the state at 20 is still true"
    assert [example["x"] for example in other.open_at(0, 30)] == changed[0][30:]
    counted = list(stream(buffer=1).open_at(1, 0))
    read = []
    assert len(list(stream(buffer=1, read=read).open_at(1, 50))) == len(counted[50:])
    assert 1000 in read, "counted from the beginning"


def test_a_line_that_was_not_finished_is_left_out(tmp_path):
    states = KeptStates(tmp_path, lambda: "states:a")
    for number in (10, 20):
        states.note(3, KeptState(number, {"place": number}, ["a"]))
    (path,) = tmp_path.glob("states-a/3.states")
    path.write_bytes(path.read_bytes()[:-5])
    again = KeptStates(tmp_path, lambda: "states:a")
    assert again.newest(3, 25) == KeptState(10, {"place": 10}, ["a"])
    assert again.newest(3, 9) is None
    assert KeptStates(tmp_path, lambda: "states:b").newest(3, 25) is None
    states.drop(3, 20)
    assert states.newest(3, 25).number == 10


def test_without_a_folder_to_write_to_and_with_states_that_are_no_text_it_counts(tmp_path):
    (tmp_path / "file").write_text("")
    states = KeptStates(pathlib.Path(tmp_path / "file" / "below"), lambda: "states:a")
    states.note(0, KeptState(10, object(), []))
    assert states.newest(0, 12).number == 10
    assert states.has(0, 10)
