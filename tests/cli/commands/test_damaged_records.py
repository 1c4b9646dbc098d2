"""A run record with values of other kinds, without some keys or cut short: one clear line from each command."""

import copy
import json

import pytest
import tiny_experiment
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxdist
from jaxdist.cli import main
from jaxdist.launch import viewer

OTHERS = st.sampled_from([None, True, -3, 2.5, 10**400, "six", "\ud800", [], [None], ["a"], {}, {"a": None}, {"a": {}}])


def places(content, path=()):
    """Return the paths of all values, the whole included."""
    members = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(found for key, each in members for found in places(each, (*path, key)))]


@st.composite
def damaged(draw, content):
    """Return the text of the record with one to three of its values replaced or removed, perhaps cut short."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        found = places(content)[1:]
        few = [each for each in found if each[0] != "config" or len(each) < 3]
        path = draw(st.sampled_from(few if draw(st.booleans()) else found))
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()):
            parent[path[-1]] = draw(OTHERS)
        else:
            del parent[path[-1]]
    text = json.dumps(content)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    jaxdist.train(tiny_experiment.get_config(), run_dir=run_dir)
    found = json.loads((run_dir / "run.json").read_bytes())
    best = {"metric": "eval/accuracy", "value": 0.5, "step": 3}
    git = {"commit": "a" * 40, "dirty": True}
    change = {"kind": "join", "step": 3, "processes": 2, "seconds_lost": 0.5}
    ps = {"updates": 3, "staleness": {"0": 3}}
    return found | {"best": best, "git": git, "changes": [change], "ps": ps, "peak_memory_bytes": {"0": 10**9}}


@pytest.fixture
def runs(tmp_path, content):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(content))
    return tmp_path


COMMANDS = {
    "runs": lambda folder: ["runs", folder],
    "compare": lambda folder: ["runs", "compare", f"{folder}/a", f"{folder}/b"],
    "report": lambda folder: ["report", f"{folder}/a", f"{folder}/b", "--out", f"{folder}/report.html"],
    "diff": lambda folder: ["diff", f"{folder}/a", f"{folder}/b"],
}


def test_every_command_names_the_record_or_does_its_work(runs, content, capsys, recwarn):
    @settings(max_examples=60)
    @given(damaged(content))
    def check(text):
        (runs / "a" / "run.json").write_text(text)
        for name, arguments in COMMANDS.items():
            with viewer.Viewer():
                status = main.run(arguments(str(runs)))
            said = capsys.readouterr().err
            assert status == (2 if said else 0), (name, said)
            assert len(said.splitlines()) <= 1
            assert "Error" not in said

    check()
