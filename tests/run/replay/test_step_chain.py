"""The chain of step hashes as a file: found by the step's number, compared where a step is made twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.run.replay import step_chain

FORM = step_chain.Form(4, ("grads/w", "loss and metrics", "params/w"))
SIZE = FORM.logical_shards + len(FORM.names)


def hashes(first_step, count, *, salt=0):
    """Return hashes that depend on the step."""
    steps = range(first_step, first_step + count)
    return np.stack([np.random.default_rng([salt, step]).integers(0, 1 << 32, SIZE, np.uint32) for step in steps])


def write(run_dir, first_step, values, *, step=None, compares=True, form=FORM):
    recorder = step_chain.ChainFile(run_dir, form, step=first_step - 1 if step is None else step, compares=compares)
    found = recorder.add(first_step, values)
    recorder.close()
    return found


@pytest.fixture
def ten(tmp_path):
    """A run directory with the hashes of ten steps."""
    assert write(tmp_path, 1, hashes(1, 10)) == []
    return tmp_path


def test_what_was_written_is_found_by_the_number_of_the_step(ten):
    chain = step_chain.read(ten)
    assert chain.form == FORM
    expected = step_chain.entries(FORM, 1, hashes(1, 10))
    assert [chain.entry(step) == expected[step - 1] for step in range(1, 11)] == [True] * 10
    assert (chain.entry(0), chain.entry(11)) == (None, None)


def test_a_directory_without_a_chain_has_none(tmp_path):
    assert step_chain.read(tmp_path) is None
    (tmp_path / step_chain.FILE_NAME).write_text("something else\n")
    assert step_chain.read(tmp_path) is None


def test_steps_made_again_with_the_same_bits_are_not_told_and_further_ones_are_added(ten):
    assert write(ten, 7, hashes(7, 6)) == []
    assert step_chain.read(ten).entry(12) is not None


def test_a_step_made_again_with_other_bits_is_told_with_its_shards_and_leaves(ten):
    again = hashes(7, 3)
    again[1, 2] ^= 1
    again[1, 6] ^= 1 << 31
    found = write(ten, 7, again)
    assert found == [step_chain.Difference(8, (2,), ("params/w",))]
    assert str(found[0]) == "step 8: logical shard 2; leaf params/w"
    assert write(ten, 7, again) == []  # the newer hashes replaced the older


@given(step=st.integers(1, 10), place=st.integers(0, SIZE - 1), bit=st.integers(0, 31))
@settings(max_examples=30)
def test_any_bit_of_any_hash_is_found_at_its_step(tmp_path_factory, step, place, bit):
    first, second = hashes(1, 10), hashes(1, 10)
    second[step - 1 :, place] ^= np.uint32(1 << bit)  # and in all that follows
    chains = [step_chain.StepChain(FORM, step_chain.entries(FORM, 1, values)) for values in (first, second)]
    found = step_chain.first_difference(*chains, range(1, 11))
    named = [*range(FORM.logical_shards), *FORM.names][place]
    assert found.step == step
    assert [*found.shards, *found.leaves] == [named]


def test_settings_that_were_changed_forget_the_steps_after(ten):
    assert write(ten, 7, hashes(7, 1, salt=1), compares=False) == []
    chain = step_chain.read(ten)
    assert chain.entry(6) is not None
    assert chain.entry(8) is None


def test_a_chain_of_another_model_is_set_aside(ten):
    other = step_chain.Form(2, FORM.names)
    write(ten, 6, hashes(6, 2)[:, :5], form=other)
    assert step_chain.read(ten).form == other
    assert (ten / f"{step_chain.FILE_NAME}.until-5").exists()
    assert step_chain.read(ten).entry(1) is None  # steps before are not recorded in the new form


def test_steps_after_the_last_one_that_counts_are_cut(ten):
    recorder = step_chain.ChainFile(ten, FORM, step=10, compares=True)
    recorder.cut(4)
    recorder.close()
    assert len(step_chain.read(ten).entries) == 4


def test_an_entry_that_was_not_written_whole_is_none_and_differs_from_nothing(ten):
    path = ten / step_chain.FILE_NAME
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert step_chain.read(ten).entry(10) is None
    assert write(ten, 10, hashes(10, 1, salt=1)) == []
    path.write_bytes(path.read_bytes()[:-3])
    assert len(step_chain.read(ten).entries) == 9


def test_leaves_whose_short_hashes_agree_still_make_a_difference():
    first, second = hashes(3, 1), hashes(3, 1)
    second[0, 5] ^= 0x00010001
    entries = [step_chain.entries(FORM, 3, values)[0] for values in (first, second)]
    found = step_chain.difference(FORM, *entries)
    assert found == step_chain.Difference(3, (), ())
    assert "short hash" in str(found)
