import numpy as np
import pytest

import jaxdist
from jaxdist import data
from jaxdist.data.streams import equivalents


class IterableDataset:
    """As torch's: it inherits a `__getitem__` that raises, and may have a length."""

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise NotImplementedError


class RandomSampler:
    pass


class DataLoader:
    def __init__(self, dataset, **settings):
        self.dataset, self.collate_fn = dataset, None
        self.__dict__.update({"batch_size": 32, "num_workers": 0, "sampler": None} | settings)

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 2


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (IterableDataset(), "data.iterable_stream(examples, ...)"),
        (set("ab"), "data.iterable_stream(examples, ...)"),
        (iter(()), "can be iterated once only"),
        (lambda: iter(()), "A function that makes examples is a stream: give data.StreamSource(function, ...)"),
        (DataLoader([1]), "Data(train=loader.dataset, shuffle=False) and global_batch_size=32"),
        (
            DataLoader([1], sampler=RandomSampler(), num_workers=4, batch_size=8),
            "Data(train=loader.dataset, shuffle=True, num_workers=4) and global_batch_size=8",
        ),
        (
            DataLoader(IterableDataset(), num_workers=4, batch_size=None),
            "Data(train=data.iterable_stream(loader.dataset, examples_per_epoch=...), shuffle=False);",
        ),
    ],
)
def test_the_message_says_what_to_write_instead(given, wanted):
    assert wanted in equivalents.equivalent(given)
    with pytest.raises(ValueError, match="cannot be used") as raised:
        jaxdist.Data(train=given)
    assert wanted in str(raised.value)
    with pytest.raises(ValueError, match=r"data\.|Data\(") as raised:
        data.Loader(given, global_batch_size=1, seed=0)
    assert wanted in str(raised.value)


@pytest.mark.parametrize("given", [[1], {"x": np.zeros(3)}, np.zeros(3), (1, 2), "text", 3, None])
def test_nothing_is_said_of_what_has_random_access_or_is_no_data(given):
    assert equivalents.equivalent(given) is None
