"""What an attempt leaves for the next: for the same experiment and code on as many devices, and only whole."""

import dataclasses
import types

import pytest
import tiny_experiment

from jaxdist.run import handover
from jaxdist.spmd import device_program

TOLD = {"a": b"\x00program", "b": b"shapes"}


@pytest.fixture(autouse=True)
def own(monkeypatch):
    monkeypatch.setattr(device_program, "TOLD", device_program.Told())


def handed(directory, *, experiment=None, hashes=types.MappingProxyType({"x.py": "1"}), num_devices=4):
    return handover.Handover(directory, experiment or tiny_experiment.get_config(), "identity", hashes, num_devices)


def attempt(made, told):
    """Return what an attempt takes over before it tells `told`, and makes four steps."""
    made.take_over()
    known = device_program.TOLD.all()
    with device_program.TOLD.kept():
        for name, content in told.items():
            device_program.TOLD.note(name, content)
    leave = made.leave()
    for step in range(1, 5):
        leave(types.SimpleNamespace(step=step))
    return known


def test_the_next_attempt_takes_over_what_one_has_left_and_adds_to_it(tmp_path):
    assert attempt(handed(tmp_path), {"a": TOLD["a"]}) == {}
    assert attempt(handed(tmp_path), {"b": TOLD["b"]}) == {"a": TOLD["a"]}
    assert attempt(handed(tmp_path), {}) == TOLD


def test_nothing_is_noted_once_it_is_left(tmp_path):
    attempt(handed(tmp_path), TOLD)
    with device_program.TOLD.kept():
        device_program.TOLD.note("an evaluation", b"")
        assert device_program.TOLD.known("a") is None
    assert device_program.TOLD.all() == {}


@pytest.mark.parametrize("other", ["experiment", "hashes", "num_devices"])
def test_nothing_is_taken_over_by_another_experiment_code_or_number_of_devices(tmp_path, other):
    attempt(handed(tmp_path), TOLD)
    changed = {
        "experiment": dataclasses.replace(tiny_experiment.get_config(), global_batch_size=4),
        "hashes": {"x.py": "2"},
        "num_devices": 3,
    }
    assert attempt(handed(tmp_path, **{other: changed[other]}), {}) == {}


def test_what_is_damaged_is_found_out_again(tmp_path):
    attempt(handed(tmp_path), TOLD)
    (left,) = tmp_path.iterdir()
    whole = left.read_bytes()
    for damaged in (whole[:-1], whole[:-10] + b"0" + whole[-9:], b""):
        left.write_bytes(damaged)
        assert attempt(handed(tmp_path), {}) == {}


def test_without_memory_or_known_files_nothing_is_handed_over(tmp_path):
    assert attempt(handed(None), TOLD) == {}
    assert attempt(handed(tmp_path, hashes=None), TOLD) == {}
    assert not [*tmp_path.iterdir()]


def test_a_step_that_depends_on_what_was_trained_before_is_not_handed_over(tmp_path):
    made = handed(tmp_path)
    made.take_over()
    with device_program.TOLD.kept():
        device_program.TOLD.note("a", b"with another schedule")
    made.end()
    leave = made.leave()
    for step in range(1, 5):
        leave(types.SimpleNamespace(step=step))
    assert not [*tmp_path.iterdir()]
