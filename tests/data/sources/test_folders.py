import os
import pickle

import numpy as np
import pytest
from PIL import Image

from jaxdist.data import Concatenated, ImageFolder, Loader


def one_epoch(source, size=4, **settings):
    loader = Loader(source, global_batch_size=size, seed=0, shuffle=False, num_epochs=1, **settings)
    return [batch for batch, _ in loader]


def save(path, value=0, size=(5, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size[::-1], 3), value, np.uint8)).save(path)


@pytest.fixture
def pictures(tmp_path):
    for number, name in enumerate(("dog/one.png", "cat/one.jpg", "dog/one.jpg", "cat/one.png")):
        save(tmp_path / name, 40 * number)
    return tmp_path


def test_folders_are_classes_in_alphabetical_order(pictures):
    source = ImageFolder(pictures)
    assert source.classes == ("cat", "dog")
    (batch,) = one_epoch(source)
    assert batch["label"].tolist() == [0, 0, 1, 1]
    assert batch["image"].shape == (4, 6, 5, 3)
    np.testing.assert_array_equal(batch["image"][1], np.asarray(Image.open(pictures / "cat" / "one.png")))
    assert np.abs(batch["image"][0].astype(int) - 40).max() <= 2
    assert source[-1]["label"] == 1
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()


def test_classes_have_the_numbers_of_the_training_data(tmp_path):
    for name in ("train/ant/1.png", "train/bee/1.png", "train/cat/1.png", "eval/cat/1.png", "eval/bee/1.png"):
        save(tmp_path / name)
    train = ImageFolder(tmp_path / "train")
    held_out = ImageFolder(tmp_path / "eval", classes=train.classes)
    assert [int(example["label"]) for example in held_out] == [1, 2]
    assert held_out.vocabulary == train.vocabulary == {"label": ("ant", "bee", "cat")}
    with pytest.raises(ValueError, match="not among the 1 classes: bee"):
        ImageFolder(tmp_path / "eval", classes=["cat"])
    with pytest.raises(ValueError, match="number the names of field 'label' alike: 0 is 'ant' in one and 'bee'"):
        Concatenated([train, ImageFolder(tmp_path / "eval")])


def test_what_tools_leave_behind_does_not_count(pictures):
    save(pictures / ".ipynb_checkpoints" / "one.png")
    save(pictures / "__MACOSX" / "one.png")
    (pictures / "cat" / "._one.png").write_bytes(b"resource fork")
    save(pictures / "cat" / ".hidden" / "one.png")
    (pictures / "cat" / "folder.png").mkdir()
    save(pictures / "cat" / "folder.png" / "inside.png")
    source = ImageFolder(pictures)
    assert source.classes == ("cat", "dog")
    assert [os.path.basename(source.location(i)) for i in range(3)] == ["inside.png", "one.jpg", "one.png"]
    assert len(source) == 5


@pytest.mark.parametrize("name", ["one.png", "one.jpg"])
def test_an_unreadable_image_is_named(pictures, name):
    path = pictures / "dog" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"Example {2 + (name == 'one.png')} .*Unreadable image: .*dog/{name}"):
        one_epoch(ImageFolder(pictures))


def test_links_to_nothing_and_bombs_can_be_skipped(pictures, monkeypatch):
    (pictures / "cat" / "gone.png").symlink_to(pictures / "nothing.png")
    save(pictures / "dog" / "large.png", size=(90, 80))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    source = ImageFolder(pictures)
    batches = one_epoch(source, on_bad="skip", size=6)
    assert batches[0]["mask"].tolist() == [0, 1, 1, 0, 1, 1]
    assert batches[0]["image"].shape == (6, 6, 5, 3)


def test_the_fingerprint_is_of_names_sizes_and_contents(pictures, tmp_path_factory):
    before = ImageFolder(pictures).fingerprint()
    assert before == ImageFolder(pictures).fingerprint()
    assert before != ImageFolder(pictures, channels=1).fingerprint()
    path = pictures / "dog" / "one.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)  # as many bytes as before
    assert ImageFolder(pictures).fingerprint() != before
    content[-20] ^= 1
    path.write_bytes(content)
    assert ImageFolder(pictures).fingerprint() == before  # whenever it was written
    path.rename(pictures / "dog" / "two.png")
    assert ImageFolder(pictures).fingerprint() != before
    with pytest.raises(ValueError, match="FILE"):
        ImageFolder(pictures / "dog")
