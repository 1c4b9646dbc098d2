import itertools
import json

import numpy as np
import pytest

from jaxdist import data
from jaxdist.data.streams import iterables


class Numbers:
    """An iterable in the manner of torch's: `__getitem__` exists and always raises."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter((np.full(2, i), i % 3) for i in range(self.count))


class Streaming:
    """A data set in the manner of Hugging Face's: some files, read forward."""

    def __init__(self, files):
        self.files, self.num_shards = files, len(files)

    def __iter__(self):
        return ({"x": x} for file in self.files for x in file)

    def shard(self, num_shards, index):
        assert num_shards == len(self.files)
        return Streaming([self.files[index]])


class Skipping(Streaming):
    def skip(self, count):
        whole = [x for file in self.files for x in file]
        return Streaming([whole[count:]])

    def shard(self, num_shards, index):
        return Skipping([self.files[index]])


def all_of(loader, name="x"):
    return [int(x) for batch, _ in loader for x in batch[name][batch["mask"] == 1]]


def test_an_iterable_is_one_shard():
    stream = data.iterable_stream(Numbers(11), sizes=11, names=("image", "label"))
    loader = data.Loader(stream, global_batch_size=4, seed=0, num_epochs=2)
    found = [int(image[0]) for batch, _ in loader for image in batch["image"][batch["mask"] == 1]]
    assert sorted(found[:11]) == sorted(found[11:]) == list(range(11))
    assert found[:11] != found[11:]


@pytest.mark.parametrize("once", [iter([1, 2]), (i for i in range(3))])
def test_what_can_be_iterated_once_only_is_refused(once):
    with pytest.raises(ValueError, match=r"opened at every start and in every epoch.*can be iterated once only"):
        data.iterable_stream(once, sizes=2)
    with pytest.raises(ValueError, match="int cannot be iterated"):
        data.iterable_stream(3, sizes=2)


@pytest.mark.parametrize("kind", [Streaming, Skipping])
def test_a_hugging_face_stream_is_divided_by_its_shards(kind):
    files = [list(range(100 * shard, 100 * shard + 5 + shard)) for shard in range(6)]
    stream = data.hugging_face_stream(kind(files), sizes=[5, 6, 7, 8, 9, 10], window=8)
    assert (stream.num_shards, stream.lanes, len(stream)) == (6, 4, 45)
    assert sorted(all_of(data.Loader(stream, global_batch_size=8, seed=0, num_epochs=1))) == sorted(
        itertools.chain(*files)
    )
    unknown = data.hugging_face_stream(kind(files), examples_per_epoch=10)
    assert data.count_examples(unknown) == [5, 6, 7, 8, 9, 10]
    # In the middle of an epoch, and of a shard.
    positions = [position for _, position in data.Loader(stream, global_batch_size=8, seed=0, num_epochs=1)]
    again = data.hugging_face_stream(kind(files), sizes=[5, 6, 7, 8, 9, 10], window=8)
    rest = all_of(data.Loader(again, global_batch_size=8, seed=0, num_epochs=1, start=positions[2]))
    assert rest == all_of(data.Loader(stream, global_batch_size=8, seed=0, num_epochs=1))[24:]


def test_counting_a_stream_that_may_never_end_says_so(monkeypatch, caplog):
    monkeypatch.setattr(iterables, "MANY_EXAMPLES", 4)
    stream = data.StreamSource(lambda shard: ({"x": np.int32(each)} for each in range(9)), examples_per_epoch=3)
    assert data.count_examples(stream) == [9]
    assert [record.getMessage().partition(".")[0] for record in caplog.records] == [
        "shard 0 has given 4 examples",
        "shard 0 has given 8 examples",
    ]


def test_what_is_no_stream_of_hugging_face_is_refused():
    with pytest.raises(ValueError, match="has num_shards and shard\\(\\); got list"):
        data.hugging_face_stream([1, 2], sizes=2)


@pytest.mark.torch
def test_the_real_streaming_data_set_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    sizes = [7, 4, 9, 5]
    for shard, size in enumerate(sizes):
        rows = [json.dumps({"x": 100 * shard + i, "text": "a"}) for i in range(size)]
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(rows))
    files = sorted(map(str, tmp_path.glob("*.jsonl")))
    made = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path / "c"))
    expected = sorted(row["x"] for row in made)

    def loader(**settings):
        stream = data.hugging_face_stream(made, sizes=sizes, window=4)
        keep = lambda example, random: {"x": np.int32(example["x"])}  # noqa: E731
        return data.Loader(stream, global_batch_size=4, seed=0, num_epochs=1, example_fn=keep, **settings)

    assert data.count_examples(data.hugging_face_stream(made, examples_per_epoch=1)) == sizes
    found = list(loader())
    assert sorted(all_of(found)) == expected
    assert all_of(loader(start=found[3].position)) == all_of(found)[16:]


@pytest.mark.torch
@pytest.mark.parametrize("change", ["none", "map", "batched map", "filter", "shuffle"])
def test_a_place_in_a_real_streaming_data_set_is_that_of_counting_whatever_its_states_say(
    tmp_path, monkeypatch, change
):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(iterables, "STATE_EVERY", 7)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"x": x}) for x in range(90)))
    whole = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True)
    made = {
        "none": lambda: whole,
        "map": lambda: whole.map(lambda row: {"y": row["x"] + 1}),
        "batched map": lambda: whole.map(lambda rows: {"y": rows["x"]}, batched=True, batch_size=4),
        "filter": lambda: whole.filter(lambda row: row["x"] % 3 > 0),
        "shuffle": lambda: whole.shuffle(seed=3, buffer_size=5),
    }[change]()
    settings = {"examples_per_epoch": 10, "sizes_folder": tmp_path / "kept"}
    expected = list(data.hugging_face_stream(made, **settings).open_at(0, 0))
    assert list(tmp_path.glob("kept/*/0.states")), "states are noted"
    for start in (0, 6, 7, 33, 34, 50):
        assert list(data.hugging_face_stream(made, **settings).open_at(0, start)) == expected[start:]


@pytest.mark.torch
def test_the_real_iterable_data_set_of_torch():
    torch = pytest.importorskip("torch")

    class Squares(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter({"x": torch.tensor(i)} for i in range(9))

    stream = data.iterable_stream(Squares(), sizes=9)
    assert sorted(all_of(data.Loader(stream, global_batch_size=4, seed=0, num_epochs=1))) == list(range(9))
    with pytest.raises(ValueError, match=r"Squares is a stream, which has no length: give data.iterable_stream"):
        data.Loader(Squares(), global_batch_size=4, seed=0)
    loader = torch.utils.data.DataLoader([{"x": 1}] * 8, batch_size=4, shuffle=True, num_workers=2)
    with pytest.raises(ValueError, match=r"Data\(train=loader.dataset, shuffle=True, num_workers=2\)"):
        data.Loader(loader, global_batch_size=4, seed=0)
