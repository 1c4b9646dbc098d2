from jaxdist import data
from jaxdist.data.streams.kept_sizes import KeptSizes


def test_sizes_are_found_by_a_later_process_for_the_same_data_only(tmp_path):
    first = KeptSizes(tmp_path, lambda: "data 1")
    assert 3 not in first
    first[3] = 70
    again = KeptSizes(tmp_path, lambda: "data 1")
    assert 3 in again
    assert again[3] == 70
    assert 3 not in KeptSizes(tmp_path, lambda: "data 2")
    assert 3 not in KeptSizes(None, lambda: "data 1")


def test_a_resume_reads_no_shard_before_the_one_that_was_open(tmp_path):
    def stream(opened):
        def open_shard(shard, start):
            opened.append(shard)
            return ({"x": 100 * shard + number} for number in range(start, 50))

        settings = {"num_shards": 6, "examples_per_epoch": 30, "seeks": True, "lanes": 1, "window": 4}
        return data.StreamSource(open_shard, sizes_folder=tmp_path, fingerprint="v1", **settings)

    opened = []
    batches = list(data.Loader(stream(opened), global_batch_size=10, seed=0, num_epochs=8, num_threads=0))
    assert len(set(opened)) == 5
    again = []
    start = batches[17].position
    rest = list(data.Loader(stream(again), global_batch_size=10, seed=0, num_epochs=8, start=start, num_threads=0))
    assert [batch["x"].tolist() for batch, _ in rest] == [batch["x"].tolist() for batch, _ in batches[18:]]
    assert len(set(again)) == 2, "the one that was open, and the next"
