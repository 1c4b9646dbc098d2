"""`jaxdist diff` on chains that are written by hand: what differs first, and what cannot be compared."""

import json
import types

import numpy as np
import pytest
import tiny_experiment

from jaxdist import errors
from jaxdist.config import overrides
from jaxdist.run.replay import comparison, step_chain
from jaxdist.rundir import record

NAMES = ("grads/w", "loss and metrics", "params/w")
FORM = step_chain.Form(4, NAMES)


def hashes(num_steps):
    return np.random.default_rng(0).integers(0, 1 << 32, (num_steps, 7), np.uint32)


def write(run_dir, values, *, form=FORM, reduction="canonical", seed=0, jaxlib="0.10"):
    """Write what `compare` reads of a run with these hashes."""
    made = record.RunRecord(
        end_reason="max_steps", step=len(values), examples_seen=0, params_sha256=None, metrics={}, strategy="s",
        reduction=reduction, num_devices=1, num_processes=1, examples_per_second=None, step_seconds={},
        time_seconds={}, compile_count=1, restarts=0, config={"seed": seed, "log_every": 5},
        versions={"jax": "0.10", "jaxlib": jaxlib}, command="c",
    )  # fmt: skip
    run_dir.mkdir()
    made.write(run_dir)
    if len(values):
        recorder = step_chain.ChainFile(run_dir, form, step=0, compares=False)
        recorder.add(1, values)
        recorder.close()
    return run_dir


def changed(step, *places, num_steps=9):
    values = hashes(num_steps)
    values[step - 1 :, list(places)] += 1
    return values


def compare(tmp_path, first, second, **changes):
    return comparison.compare(write(tmp_path / "a", first), write(tmp_path / "b", second, **changes))


def test_equal_runs_are_equal_as_far_as_both_went(tmp_path):
    found = compare(tmp_path, hashes(9), hashes(9)[:6])
    assert (found.equal, found.steps, found.compared, found.first_difference) == (True, 6, 6, None)
    assert str(found) == (f"Equal: the same bits in steps 1 to 6. {tmp_path / 'a'} made 9 steps, {tmp_path / 'b'} 6.")
    assert json.loads(json.dumps(found.to_json()))["equal"] is True


def test_a_chain_that_ends_before_its_run_is_told(tmp_path):
    cut = write(tmp_path / "b", hashes(9)) / step_chain.FILE_NAME
    size = len(cut.read_bytes())
    cut.write_bytes(cut.read_bytes()[: size * 2 // 3])
    found = comparison.compare(write(tmp_path / "a", hashes(9)), tmp_path / "b")
    assert found.equal
    assert f"The chain of {tmp_path / 'b'} ends at step {found.steps} of 9" in str(found)


@pytest.mark.parametrize(
    ("places", "shards", "leaves", "meaning"),
    [
        ((2, 4, 6), (2,), ("grads/w", "params/w"), "computed otherwise"),
        ((4, 6), (), ("grads/w", "params/w"), "their sum is not"),
        ((6,), (), ("params/w",), "the optimizer, or its state"),
    ],
)
def test_the_first_difference_is_named_and_explained(tmp_path, places, shards, leaves, meaning):
    found = compare(tmp_path, hashes(9), changed(4, *places))
    assert found.first_difference == step_chain.Difference(4, shards, leaves)
    assert not found.equal
    assert meaning in str(found)
    assert "`jaxdist replay RUN_DIR --step 4`" in str(found)


@pytest.mark.parametrize(
    ("changes", "words"), [({"seed": 1}, "seed 0 -> 1"), ({"jaxlib": "0.12"}, "jaxlib 0.10 -> 0.12")]
)
def test_what_decides_the_bits_and_differs_is_named(tmp_path, changes, words):
    text = str(compare(tmp_path, hashes(9), changed(1, 0, 4, 5, 6), **changes))
    assert words in text
    assert "Other bits are expected." in text


def test_runs_that_have_no_chain_or_are_not_canonical_or_of_other_models_are_sentences(tmp_path):
    good, bare = write(tmp_path / "good", hashes(3)), write(tmp_path / "bare", hashes(0))
    mean = write(tmp_path / "mean", hashes(3), reduction="mean")
    more = write(tmp_path / "more", hashes(3)[:, 2:], form=step_chain.Form(2, NAMES))
    other = write(tmp_path / "other", hashes(3), form=step_chain.Form(4, ("grads/v", *NAMES[1:])))
    for second, words in [
        (bare, "guards.step_hashes=false"),
        (mean, "reduction=mean"),
        (more, "one has 4 logical shards, the other 2"),
        (other, "other leaves"),
        (tmp_path / "nowhere", "Name another"),
    ]:
        with pytest.raises(errors.UserError, match=words):
            comparison.compare(good, second)


@pytest.mark.parametrize("place", [2, 5, 9, 20, -1])
def test_a_damaged_entry_is_told_and_not_called_equal(tmp_path, place):
    path = write(tmp_path / "b", hashes(9)) / step_chain.FILE_NAME
    content, line = bytearray(path.read_bytes()), len(FORM.line())
    size = FORM.entry.itemsize
    content[line + 3 * size + place % size] ^= 4
    path.write_bytes(content)
    found = comparison.compare(write(tmp_path / "a", hashes(9)), tmp_path / "b")
    assert (found.equal, found.compared) == (True, 8)
    assert f"{path} is damaged at step 4: this was not compared." in str(found)


def test_steps_that_one_run_has_not_recorded_are_counted(tmp_path):
    first, second = write(tmp_path / "a", hashes(5)), write(tmp_path / "b", hashes(0))
    record_path = second / record.FILE_NAME
    record_path.write_text(record_path.read_text().replace('"step": 0', '"step": 5'))
    recorder = step_chain.ChainFile(second, FORM, step=2, compares=False)
    recorder.add(3, hashes(5)[2:])
    recorder.close()
    found = comparison.compare(first, second)
    assert (found.equal, found.compared) == (True, 3)
    assert "2 steps are recorded in one of them only" in str(found)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], True),
        (["log_every=7", "checkpoints.every_steps=1", "eval.every_epochs=2"], True),
        (["seed=1"], False),
        (["optimizer.learning_rate=0.2"], False),
        (["logical_shards=4"], False),
        (["stop.max_steps=11"], False),
    ],
)
def test_the_same_bits_are_expected_of_the_same_settings(changes, expected):
    experiment = tiny_experiment.get_config()
    config = json.loads(json.dumps(record.plain(experiment)))
    earlier = types.SimpleNamespace(versions=record.versions(), extra={}, config=config)
    assert comparison.same_bits_expected(overrides.override(experiment, changes), earlier) is expected


HERE = -1


@pytest.mark.parametrize(
    ("version", "extra", "expected"),
    [
        ({"jaxlib": "0.1"}, {}, False),
        ({}, {"cpu_threads": 64}, False),
        ({}, {"cpu_threads": None}, True),
        ({}, {"cpu_threads": HERE}, True),
        ({}, {"jax_settings": None}, True),
        ({}, {"jax_settings": record.jax_settings() | {"jax_of_another_version": "1"}}, True),
        ({}, {"jax_settings": record.jax_settings() | {"jax_enable_x64": "True"}}, False),
    ],
)
def test_other_bits_may_come_of_another_version_or_number_of_threads(version, extra, expected):
    experiment = tiny_experiment.get_config()
    config = json.loads(json.dumps(record.plain(experiment)))
    extra = {name: comparison.cpu_threads() if threads == HERE else threads for name, threads in extra.items()}
    earlier = types.SimpleNamespace(versions=record.versions() | version, extra=extra, config=config)
    assert expected == comparison.same_bits_expected(experiment, earlier)


def test_a_setting_that_one_of_two_runs_has_may_decide_the_bits():
    experiment = tiny_experiment.get_config()
    config = json.loads(json.dumps(record.plain(experiment)))
    config["optimizer"]["arguments"] = {"b1": 0.5}
    earlier = types.SimpleNamespace(versions=record.versions(), extra={}, config=config)
    assert comparison.changed_since(earlier, experiment) == ["optimizer.arguments.b1 0.5 -> not set"]


def test_another_setting_of_jax_is_told_by_name(tmp_path):
    first, second = write(tmp_path / "a", hashes(3)), write(tmp_path / "b", changed(2, 0, num_steps=3))
    for run_dir, kind in ((first, "threefry2x32"), (second, "rbg")):
        content = json.loads((run_dir / record.FILE_NAME).read_text())
        content["jax_settings"] = record.jax_settings() | {"jax_default_prng_impl": kind}
        (run_dir / record.FILE_NAME).write_text(json.dumps(content))
    found = comparison.compare(first, second)
    assert found.versions == ["jax_default_prng_impl threefry2x32 -> rbg"]
    assert "Other bits are expected" in str(found)
