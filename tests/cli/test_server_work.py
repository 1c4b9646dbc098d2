"""What the command line of `jaxdist train` becomes for a parameter server."""

import pathlib
import types

import pytest
import tiny_experiment

from jaxdist.cli import parser, server_work
from jaxdist.errors import UserError
from jaxdist.paramserver.run import start

TINY = tiny_experiment.__file__


def parse(*arguments):
    options = parser.make_parser().parse_args(["train", TINY, "--strategy", "parameter-server", *map(str, arguments)])
    options.command = "jaxdist train"
    return options


@pytest.fixture
def asked(monkeypatch):
    """The settings that the parameter server was started with, one object a start."""
    found = []

    def train(settings):
        found.append(settings)
        return types.SimpleNamespace(end_reason="max_steps", to_json=dict)

    monkeypatch.setattr(start, "train", train)
    return found


def test_the_options_reach_the_parameter_server(asked, tmp_path):
    options = parse("--devices", 2, "--max-steps", 7, "--run-dir", tmp_path, "--set", "ps.workers=3", "--json")
    assert server_work.train(options, request=[]) == 0
    (settings,) = asked
    assert (settings.experiment, settings.run_dir, settings.devices) == (TINY, tmp_path, 2)
    assert settings.assignments == ["ps.workers=3", "strategy=parameter-server", "stop.max_steps=7"]
    assert settings.silent
    assert not settings.resume
    assert not settings.stop_requested()


def test_a_request_to_stop_is_seen(asked, tmp_path):
    request = []
    server_work.train(parse("--run-dir", tmp_path), request)
    request.append("SIGTERM")
    assert asked[0].stop_requested()


@pytest.mark.parametrize(
    ("arguments", "holds_run", "resumes"),
    [([], True, False), (["--resume"], True, True), (["--restartable"], True, True), (["--restartable"], False, False)],
)
def test_a_restartable_run_resumes_where_there_is_one(asked, tmp_path, arguments, holds_run, resumes):
    if holds_run:
        pathlib.Path(tmp_path / "run.json").write_text("{}")
    server_work.train(parse("--run-dir", tmp_path, *arguments), request=[])
    assert asked[0].resume is resumes


def test_processes_have_no_meaning_here(asked, tmp_path):
    with pytest.raises(UserError, match="leave --processes out"):
        server_work.train(parse("--processes", 2, "--run-dir", tmp_path), request=[])
    assert not asked
