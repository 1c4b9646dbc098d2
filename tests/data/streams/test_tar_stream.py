import file_server
import numpy as np
import pytest
import tar_files

from jaxdist import data

SIZES = (5, 3, 7, 4)
NUMBERS = [range(sum(SIZES[:shard]), sum(SIZES[: shard + 1])) for shard in range(len(SIZES))]
FIELDS = {"image": "png", "array": "npy"}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_shards_on_a_server_are_read_forward_each_sample_once_and_resumed(suffix):
    with file_server.serving() as files:
        for number, numbers in enumerate(NUMBERS):
            files.contents[f"/{number}.tar{suffix}"] = tar_files.PACK[suffix](tar_files.shard(numbers))

        def loader(**settings):
            stream = data.tar_stream(f"{files.url}/{{0..3}}.tar{suffix}", fields=FIELDS, sizes=SIZES, window=8)
            return data.Loader(stream, global_batch_size=4, seed=0, num_epochs=1, **settings)

        batches = list(loader())
        pairs = [
            (int(array[0]), image)
            for batch, _ in batches
            for array, image, true in zip(batch["array"], batch["image"], batch["mask"])
            if true
        ]
        assert sorted(number for number, _ in pairs) == list(range(sum(SIZES)))
        for number, image in pairs:
            np.testing.assert_array_equal(image, tar_files.sample(number)[1])
        resumed = [
            int(x[0]) for batch, _ in loader(start=batches[1].position) for x in batch["array"][batch["mask"] == 1]
        ]
        assert resumed == [number for number, _ in pairs[8:]]


def test_a_stream_of_unknown_size_and_files_that_are_not_whole(tmp_path):
    for number, numbers in enumerate(NUMBERS):
        (tmp_path / f"{number}.tar").write_bytes(tar_files.shard(numbers))
    stream = data.tar_stream(tmp_path, fields=FIELDS, examples_per_epoch=12)
    assert data.count_examples(stream) == list(SIZES)
    batch = next(iter(data.Loader(stream, global_batch_size=4, seed=0))).batch
    assert batch["image"].shape == (4, 4, 5, 3)
    (tmp_path / "3.tar").write_bytes(tar_files.shard(NUMBERS[3])[:9000])
    with pytest.raises(ValueError, match=r"3.tar is not a whole tar file"):
        data.count_examples(data.tar_stream(tmp_path, fields=FIELDS, examples_per_epoch=12))


def test_a_damaged_sample_is_skipped(tmp_path):
    parts = [("0.npy", tar_files.sample(0)[0]["npy"]), ("1.npy", b"no array"), ("2.npy", tar_files.sample(2)[0]["npy"])]
    (tmp_path / "a.tar").write_bytes(tar_files.tar_of(parts))
    stream = data.tar_stream(tmp_path / "a.tar", fields={"array": "npy"}, sizes=[3])
    with pytest.raises(ValueError, match=r"a.tar: 1.npy cannot be decoded"):
        list(data.Loader(stream, global_batch_size=3, seed=0, num_epochs=1, fingerprint=""))
    loader = data.Loader(stream, global_batch_size=3, seed=0, num_epochs=1, on_bad="skip", fingerprint="")
    found = [int(x[0]) for batch, _ in loader for x in batch["array"][batch["mask"] == 1]]
    assert sorted(found) == [0, 2]
