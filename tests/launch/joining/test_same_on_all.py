import json
import os
import sys
import types

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.errors import TryAgain
from jaxdist.launch.joining import same_on_all

FACTS = st.dictionaries(st.sampled_from(["jax", "lr", "file a.py"]), st.sampled_from([1, 2, "x", None]))


def told(*facts):
    return [{"host": f"h{number}", **each} for number, each in enumerate(facts)]


@given(FACTS, st.integers(1, 6))
def test_processes_that_say_the_same_are_equal_whatever_their_hosts(facts, count):
    assert same_on_all.describe(told(*[facts] * count)) == ""


@given(st.lists(FACTS, min_size=2, max_size=6))
def test_a_difference_names_a_process_and_the_fact(facts):
    text = same_on_all.describe(told(*facts))
    names = {name for each in facts for name in each}
    different = {name for name in names if len({json.dumps(each.get(name)) for each in facts}) > 1}
    assert bool(text) == bool(different)
    for name in different:
        assert f"  {name}: process " in text


def test_most_processes_are_taken_to_be_right():
    text = same_on_all.describe(told({"jax": "1"}, {"jax": "2"}, {"jax": "2"}, {"jax": "3"}))
    assert 'jax: process 0 (h0) has "1", the others "2"' in text
    assert 'jax: process 3 (h3) has "3", the others "2"' in text


def test_process_0_is_taken_to_be_right_where_as_many_say_otherwise():
    text = same_on_all.describe(told({"jax": "1"}, {"jax": "2"}))
    assert text.endswith('jax: process 1 (h1) has "2", the others "1"')


def test_a_long_list_of_differences_is_cut():
    text = same_on_all.describe(told({}, {f"file {n:02}.py": "x" for n in range(20)}))
    assert text.count("process 1") == 8
    assert text.endswith("... and 12 more")


def test_a_changed_file_of_the_experiment_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("a = 1\n")
    before = same_on_all.of_experiment({"optimizer": {"learning_rate": 0.1}}, same_on_all.files_of(path))
    path.write_text("a = 2\n")
    after = same_on_all.of_experiment({"optimizer": {"learning_rate": 0.2}}, same_on_all.files_of(path))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"file mine.py", "setting optimizer.learning_rate"}


def test_a_module_whose_file_is_none_is_no_part_of_the_experiment(tmp_path, monkeypatch):
    """torch.classes and torch.ops are such modules: each experiment that imported torch failed in its own folder."""
    (tmp_path / "e.py").write_text("")
    monkeypatch.chdir(tmp_path)
    made = types.ModuleType("made")
    made.__file__ = "_made.py"
    monkeypatch.setitem(sys.modules, "made", made)
    files = [f"file {name}" for name in same_on_all.files_of("e.py")]
    assert files == ["file e.py"]


def test_the_start_says_versions_devices_and_every_file_of_the_package():
    facts = same_on_all.of_start(3)
    assert facts["--devices"] == 3
    assert {"version of jax", "version of python", "file jaxdist/cli/main.py", "jax_enable_x64"} <= set(facts)


def test_code_that_was_looked_at_is_not_read_again(monkeypatch):
    """A process that was forked runs what was imported before, whatever its file has become."""
    same_on_all.look_ahead()
    before = same_on_all.of_start(1)
    monkeypatch.setattr(same_on_all, "_hash", lambda path: "another")
    monkeypatch.setattr(os.path, "islink", lambda path: pytest.fail(f"looked at {path} again"))
    assert same_on_all.of_start(1) == before
    assert same_on_all._without_links([same_on_all.__file__]) == {os.path.realpath(same_on_all.__file__)}


def test_outside_a_job_there_is_nobody_to_differ_from():
    same_on_all.compare("anything", {"a": 1})
    assert same_on_all.from_first("anything", "mine") == "mine"


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "expected"),
    [
        ("flags\t\t: fpu sse4_2 avx avx2 fma avx512f\n", "x86_64", "x86_64, AVX2 with FMA"),
        ("model\t: 1\nflags\t\t: fpu sse4_2 avx avx2 fma\n", "x86_64", "x86_64, AVX2 with FMA"),
        ("flags\t\t: fpu sse4_2 avx\n", "x86_64", "x86_64, AVX"),
        ("flags\t\t: fpu sse4_2\n", "x86_64", "x86_64, SSE4.2"),
        ("Features\t: fp asimd\n", "aarch64", "aarch64, NEON"),
        ("", "riscv64", "riscv64, none of these"),
    ],
)
def test_processors_that_compute_other_bits_differ(cpuinfo, machine, expected):
    assert same_on_all.instructions(cpuinfo, machine) == expected


class Silent:
    """A store in which nothing appears."""

    def blocking_key_value_get(self, key, milliseconds):
        raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: GetKeyValue() timed out with key: {key} [type.x='']")


def test_a_process_that_says_nothing_is_named_without_the_words_of_the_store():
    with pytest.raises(TryAgain, match=r"^Process 3 did not report its devices within 2 s, or") as raised:
        same_on_all._get(Silent(), "devices", 3, 2.0)
    assert "GetKeyValue" not in str(raised.value)


class Store(dict):
    """The coordinator's store, where all processes have said their part already."""

    def key_value_set(self, key, value):
        self[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        return self[key]


@pytest.mark.parametrize(("others", "expected"), [(["True", "True"], True), (["True", "False"], False)])
def test_something_holds_on_all_processes_or_not(monkeypatch, others, expected):
    store = Store({f"jaxdist/kept/{number}": said for number, said in enumerate(others, 1)})
    monkeypatch.setattr(same_on_all, "_job", lambda: (store, 0, 3))
    assert same_on_all.all_of("kept", True) is expected
    monkeypatch.setattr(same_on_all, "_job", lambda: (store, 2, 3))
    assert same_on_all.all_of("kept", others[1] == "True") is expected
    monkeypatch.setattr(same_on_all, "_job", lambda: (None, 0, 1))
    assert [same_on_all.all_of("kept", value) for value in (True, False)] == [True, False]
