import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.rundir.remote import uploads


def make(directory, **contents):
    directory.mkdir(parents=True)
    for name, text in contents.items():
        (directory / name).write_text(text)
    return directory


def test_a_description_survives_the_way_and_names_what_differs(tmp_path):
    made = uploads.UploadedCheckpoint.of(make(tmp_path / "40.1", a="one", b="two"))
    again = uploads.UploadedCheckpoint.from_bytes(made.to_bytes(), "40.1")
    assert (again, again.step, again.folder) == (made, 40, "checkpoints/40.1")
    again.check(make(tmp_path / "same", a="one", b="two", more="is not checked"))
    with pytest.raises(uploads.DamagedUploadError, match=r"40\.1/b does not hold"):
        again.check(make(tmp_path / "changed", a="one", b="TWO"))
    with pytest.raises(uploads.DamagedUploadError, match=r"40\.1/a is missing"):
        again.check(make(tmp_path / "lacking", b="two"))


def test_a_description_of_another_checkpoint_or_half_of_one_is_refused(tmp_path):
    content = uploads.UploadedCheckpoint.of(make(tmp_path / "8", a="1")).to_bytes()
    for damaged, name in ((content, "4"), (content[:-5], "8"), (content.replace(b'"a"', b'"b"'), "8"), (b"[]", "8")):
        with pytest.raises(uploads.DamagedUploadError):
            uploads.UploadedCheckpoint.from_bytes(damaged, name)


def test_only_objects_of_checkpoints_have_a_checkpoint():
    assert uploads.checkpoint_of(uploads.object_name("40.1")) == "40.1"
    assert [uploads.checkpoint_of(name) for name in ("uploaded/x.json", "run.json", "a/40.json")] == [None] * 3


@given(
    remote=st.sets(st.integers(1, 30)),
    kept=st.sets(st.integers(1, 30)),
    last=st.integers(1, 4),
    every=st.none() | st.integers(1, 10),
    best=st.none() | st.integers(1, 30),
)
def test_what_is_superfluous_is_neither_new_nor_best_nor_kept_forever(remote, kept, last, every, best):
    names = {str(step) for step in remote}
    found = uploads.superfluous(names, kept={*map(str, kept)}, keep_last=last, keep_every=every, best=best)
    gone = {int(name) for name in found}
    newest = sorted(remote | kept)[-last:]
    stays = {step for step in remote if step in newest or step == best or step in kept or (every and step % every == 0)}
    assert gone == remote - stays
