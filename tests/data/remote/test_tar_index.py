import io
import tarfile

import hypothesis
import pytest
import tar_files
from hypothesis import strategies as st

from jaxdist.data.remote import tar_index

LONG = "a/" * 60 + "x"


def samples_by_hand(content):
    """Group the members as WebDataset does, by tarfile alone."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive.getmembers():
            key, _, extension = member.name.rpartition("/")[2].partition(".")
            key = member.name[: len(member.name) - len(extension) - 1]
            if not found or found[-1][0] != key:
                found.append((key, {}))
            found[-1][1][extension.lower()] = archive.extractfile(member).read()
    return found


def test_what_an_archiver_adds_beside_the_samples_belongs_to_none():
    added = ("._a.cls", "__MACOSX/a.cls", "x/__MACOSX/a.cls", "x/.DS_Store", "README", "__notes.txt")
    assert [tar_index.key_and_extension(name) for name in added] == [None] * len(added)
    assert tar_index.key_and_extension("MACOSX/a.cls") == ("MACOSX/a", "cls")


names = st.lists(st.sampled_from(["a", "b.c", "x/y", LONG, "ü"]), min_size=1, max_size=5, unique=True)
extensions = st.lists(st.sampled_from(["jpg", "cls", "seg.png", "JSON"]), min_size=1, max_size=4, unique=True)


@hypothesis.settings(max_examples=40)
@hypothesis.given(names, extensions, st.binary(max_size=1500))
def test_index_and_stream_give_what_tarfile_gives(keys, parts, content):
    keys = [key.replace(".", "") for key in keys]
    made = tar_files.tar_of([(f"{key}.{part}", content + part.encode()) for key in keys for part in parts])
    expected = samples_by_hand(made)
    indexed = tar_index.index_tar(io.BytesIO(made), "x.tar")
    read = [(key, {name: made[at : at + size] for name, (at, size) in places.items()}) for key, places in indexed]
    assert read == expected
    assert list(tar_index.read_samples(io.BytesIO(made), "x.tar")) == expected
    assert tar_index.from_json(tar_index.to_json(indexed)) == indexed


def test_members_that_are_no_samples_are_left_out():
    made = tar_files.tar_of(
        [("README", b"x"), (".hidden", b""), ("__meta__.json", b""), ("a/1.cls", b"3"), ("b.", b"")]
    )
    assert [key for key, _ in tar_index.index_tar(io.BytesIO(made), "x")] == ["a/1"]
    assert tar_index.key_and_extension("a.b/cat.seg.PNG") == ("a.b/cat", "seg.png")
    with pytest.raises(ValueError, match=r"x.tar: the sample of 1.cls has two parts 'cls'"):
        tar_index.index_tar(io.BytesIO(tar_files.tar_of([("1.cls", b""), ("1.cls", b"")])), "x.tar")


@pytest.mark.parametrize("cut", ["in a header", "in the content", "between two members", "other content", "nothing"])
def test_a_file_that_is_not_whole_is_refused_also_where_it_is_cut_between_members(cut):
    whole = tar_files.tar_of([(f"{number}.txt", b"x" * 700) for number in range(4)])
    each = 512 + 1024
    content = {
        "in a header": whole[: 2 * each + 100],
        "in the content": whole[: 2 * each + 800],
        "between two members": whole[: 2 * each],
        "other content": b"no tar file" * 100,
        "nothing": b"",
    }[cut]
    for read in (tar_index.index_tar, lambda *given: list(tar_index.read_samples(*given))):
        with pytest.raises(ValueError, match=r"x.tar is not a whole tar file, it ends or is damaged"):
            read(io.BytesIO(content), "x.tar")
    damaged = whole[:each] + b"\x01" * 512 + whole[each + 512 :]
    with pytest.raises(ValueError, match=r"damaged after 0\.txt"):
        tar_index.index_tar(io.BytesIO(damaged), "x.tar")


@pytest.mark.parametrize("more", [tar_files.tar_of([("9.cls", b"9")]), bytes(1 << 20) + b"x"], ids=["a tar", "bytes"])
def test_what_follows_the_end_of_a_tar_file_is_not_left_out_silently(more):
    whole = tar_files.tar_of([("0.cls", b"0"), ("1.cls", b"1")])
    for read in (tar_index.index_tar, lambda *given: list(tar_index.read_samples(*given))):
        assert len(read(io.BytesIO(whole + bytes(1 << 20)), "x.tar")) == 2
        with pytest.raises(ValueError, match=r"x\.tar has more after the end of its tar file"):
            read(io.BytesIO(whole + more), "x.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_part_that_is_a_link_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, link in (("1.cls", ""), ("README", "1.cls"), ("2.cls", "1.cls")):
            member = tarfile.TarInfo(name)
            if link:
                member.type, member.linkname = kind, link
            archive.addfile(member, io.BytesIO())
    content = (tmp_path / "x.tar").read_bytes()
    for read in (tar_index.index_tar, lambda file, name: list(tar_index.read_samples(file, name))):
        with pytest.raises(ValueError, match=r"x\.tar: 2\.cls is a link to 1\.cls, and the sample would lack it"):
            read(io.BytesIO(content), "x.tar")


def test_parts_of_a_sample_that_do_not_follow_each_other_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("1.cls", "2.cls", "1.txt"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match=r"the parts of the sample '1' do not follow each other, 1\.txt comes later"):
        tar_index.index_tar(io.BytesIO((tmp_path / "x.tar").read_bytes()), "x.tar")
