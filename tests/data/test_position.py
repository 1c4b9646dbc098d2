import dataclasses
import json

import pytest

from jaxdist.data import Position

HERE = Position(2, 30, 100, 7, "shuffled-1", "arrays:abc")


def test_a_position_survives_json():
    assert Position.from_json(json.loads(json.dumps(HERE.to_json()))) == HERE
    for values in ({**HERE.to_json(), "more": 1}, {"epoch": 0}):
        with pytest.raises(ValueError, match="A data position has the keys"):
            Position.from_json(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "arrays:x"}, "The data have changed: .* arrays:abc, the source now has arrays:x"),
        ({"num_examples": 99}, "has num_examples 100, the loader has 99"),
        ({"seed": 8}, "has seed 7, the loader has 8"),
        ({"order_version": "sequential-1"}, "has order_version 'shuffled-1', the loader has 'sequential-1'"),
    ],
)
def test_a_position_of_other_data_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        HERE.check_resumable(dataclasses.replace(HERE, **change))


@pytest.mark.parametrize(("epoch", "position"), [(-1, 0), (0, 101), (0, -1)])
def test_a_position_outside_the_data_is_refused(epoch, position):
    with pytest.raises(ValueError, match="Not a position of a data set of 100 examples"):
        dataclasses.replace(HERE, epoch=epoch, position=position).check_resumable(HERE)
    for epoch, position in ((5, 100), (0, 0)):
        dataclasses.replace(HERE, epoch=epoch, position=position).check_resumable(HERE)
