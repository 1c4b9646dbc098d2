import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.rundir import ledger


@dataclasses.dataclass(frozen=True)
class Place:
    epoch: int
    position: int


def place_after(step, num_examples, batch_size):
    """Where the data stand after `step` steps; None before the first."""
    if step == 0:
        return None
    steps_per_epoch = -(-num_examples // batch_size)
    epoch, step_in_epoch = divmod(step - 1, steps_per_epoch)
    return Place(epoch, min((step_in_epoch + 1) * batch_size, num_examples))


def record(run_dir, begin, end, num_examples, batch_size):
    """Record the steps from `begin` to `end` in the ledger, as a training loop does."""
    recorder = ledger.Recorder(run_dir, step=begin, place=place_after(begin, num_examples, batch_size))
    for step in range(begin + 1, end + 1):
        recorder.add(step, place_after(step, num_examples, batch_size))
    recorder.close()


@given(
    num_examples=st.integers(1, 20),
    batch_size=st.integers(1, 8),
    attempts=st.lists(st.tuples(st.integers(0, 10), st.integers(1, 15)), min_size=1, max_size=6),
)
def test_any_history_of_restarts_leaves_each_example_once(tmp_path_factory, num_examples, batch_size, attempts):
    run_dir = tmp_path_factory.mktemp("run")
    reached = 0
    for steps_back, steps in attempts:
        begin = max(0, reached - steps_back)
        reached = begin + steps
        record(run_dir, begin, reached, num_examples, batch_size)
    entries = ledger.read(run_dir)
    assert [entry.step for entry in entries] == list(range(1, reached + 1))
    whole = ledger.check(entries, num_examples=num_examples)
    assert whole == reached // -(-num_examples // batch_size)


@given(
    damage=st.sampled_from(["drop", "repeat", "shift", "shorten"]),
    where=st.integers(0, 8),
)
def test_any_lost_or_repeated_example_is_found(damage, where):
    entries = [ledger.LedgerEntry(s, (s - 1) // 5, (s - 1) % 5 * 2, min((s - 1) % 5 * 2 + 2, 9)) for s in range(1, 11)]
    assert ledger.check(entries, num_examples=9) == 2
    entry = entries[where]
    entries[where : where + 1] = {
        "drop": [],
        "repeat": [entry, entry],
        "shift": [dataclasses.replace(entry, begin=entry.begin + 1)],
        "shorten": [dataclasses.replace(entry, end=entry.end - 1)],
    }[damage]
    with pytest.raises(ledger.LedgerError):
        ledger.check(entries, num_examples=9)


def test_the_message_says_whether_examples_were_lost_or_used_twice():
    first = ledger.LedgerEntry(1, 0, 0, 4)
    with pytest.raises(ledger.LedgerError, match=r"Step 2 .*positions \[6, 8\).*were lost"):
        ledger.check([first, ledger.LedgerEntry(2, 0, 6, 8)], num_examples=8)
    with pytest.raises(ledger.LedgerError, match="were used twice"):
        ledger.check([first, ledger.LedgerEntry(2, 0, 2, 8)], num_examples=8)
    with pytest.raises(ledger.LedgerError, match="epoch 1 when 4 of 8 examples of epoch 0"):
        ledger.check([first, ledger.LedgerEntry(2, 1, 0, 4)], num_examples=8)


def test_a_line_cut_short_by_a_death_does_not_count(tmp_path):
    record(tmp_path, 0, 3, 8, 2)
    path = tmp_path / ledger.FILE_NAME
    path.write_text(path.read_text()[:-3])
    assert [entry.step for entry in ledger.read(tmp_path)] == [1, 2]
    record(tmp_path, 2, 4, 8, 2)
    assert ledger.check(ledger.read(tmp_path), num_examples=8) == 1


@pytest.mark.parametrize("damaged", ["2 0 2", "2 1", "from", "from 1 2", "2 0 2 x", "from two", "2 0 2 \xfd"])
def test_a_damaged_line_is_refused(tmp_path, damaged):
    record(tmp_path, 0, 3, 8, 2)
    path = tmp_path / ledger.FILE_NAME
    path.write_text(path.read_text().replace("2 0 2 4\n", f"{damaged}\n"), encoding="latin-1")
    with pytest.raises(ledger.LedgerError, match="Line 4 of the ledger cannot be read"):
        ledger.read(tmp_path)


def test_a_gap_in_the_steps_is_refused_also_where_no_example_is_missing(tmp_path):
    record(tmp_path, 0, 3, 8, 2)
    entries = ledger.read(tmp_path)
    with pytest.raises(ledger.LedgerError, match="After step 2 the ledger continues with step 4"):
        ledger.check([*entries[:2], dataclasses.replace(entries[2], step=4)], num_examples=8)
    record(tmp_path, 5, 6, 8, 2)
    with pytest.raises(ledger.LedgerError, match="continues from step 5, but the last recorded step is 3"):
        ledger.read(tmp_path)


def test_a_run_without_a_ledger_says_how_to_record_one(tmp_path):
    with pytest.raises(ledger.LedgerError, match=r"--set recovery\.ledger=true"):
        ledger.read(tmp_path)


@pytest.mark.parametrize("back_to", [0, 1, 2, 3])
def test_a_process_that_goes_back_itself_discards_the_steps_after_that(tmp_path, back_to):
    """As after a rollback of a parameter server: the same process records the steps again."""
    recorder = ledger.Recorder(tmp_path)
    for step in [*range(1, 4), *range(back_to + 1, 5)]:
        recorder.add_range(step, 0, 2 * step - 2, 2 * step)
    recorder.close()
    assert ledger.read(tmp_path) == [ledger.LedgerEntry(step, 0, 2 * step - 2, 2 * step) for step in range(1, 5)]


def test_a_step_without_examples_is_no_step():
    with pytest.raises(ledger.LedgerError, match=r"trained on positions \[0, 0\).*so it has no example, or more"):
        ledger.check([ledger.LedgerEntry(1, 0, 0, 0)], num_examples=8)
    with pytest.raises(ledger.LedgerError, match=r"positions \[0, 9\) .* was 0 of 8"):
        ledger.check([ledger.LedgerEntry(1, 0, 0, 9)], num_examples=8)


@given(
    attempts=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=4),
    cut=st.integers(1, 10_000),
    steps_back=st.integers(0, 3),
)
def test_a_file_that_ends_anywhere_is_continued_from_any_step_that_is_whole_in_it(attempts, cut, steps_back):
    """A full disk ends a line at any character: also the one that says where a process continues."""
    text, reached = "", 9  # a step of two digits is soon reached: a part of its number is another step's
    text += "\nfrom 0\n" + "".join(f"{step} 0 {step - 1} {step}\n" for step in range(1, 10))
    for steps_before, steps, steps_again in attempts:
        begin = max(0, reached - steps_before)
        reached = begin + steps
        text += f"\nfrom {begin}\n" + "".join(f"{step} 0 {step - 1} {step}\n" for step in range(begin + 1, reached + 1))
        if steps_again:  # a process that goes back itself writes no line break before that
            reached = max(1, reached - steps_again + 1)
            text += f"from {reached - 1}\n{reached} 0 {reached - 1} {reached}\n"
    text = text[: max(1, len(text) - cut % len(text))]
    whole = ledger.lineage(text[: text.rfind("\n") + 1].split("\n"))
    assert ledger.lineage(text.split("\n")) == whole
    resumed = max(0, len(whole) - steps_back)
    again = f"\nfrom {resumed}\n{resumed + 1} 0 {resumed} {resumed + 1}\n"
    entries = ledger.lineage((text + again).split("\n"))
    assert entries == [ledger.LedgerEntry(step, 0, step - 1, step) for step in range(1, resumed + 2)]
