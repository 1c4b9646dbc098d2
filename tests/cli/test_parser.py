"""The parser: what it accepts, which handlers it names, and that it needs nothing heavy."""

import argparse
import importlib.metadata
import resource
import subprocess
import sys

import pytest

from jaxdist import extras
from jaxdist.cli import main, parser

X = "x.py"
RUN = "runs/a"
COMMANDS = {
    "train": [X],
    "launch": [X],
    "verify": [X],
    "chaos": [X],
    "join": [RUN],
    "leave": [RUN],
    "plan": [X, "--topology", "cpu:8"],
    "doctor": [],
    "runs": [],
    "report": [RUN],
    "sweep": [X, "--over", "seed=1,2"],
    "lr-range": [X],
    "coordinate-check": [X],
    "eval": [RUN],
    "predict": [RUN, "in.csv", "out.csv"],
    "export": [RUN, "out", "--format", "npz"],
    "replay": [RUN, "--step", "3"],
    "diff": [RUN, RUN],
    "data prepare": ["in.csv", "out"],
    "data inspect": [X],
}
"""Every command with the arguments that it requires."""


def parse(*arguments):
    return parser.make_parser().parse_args(arguments)


def names_of(command_line):
    """Return the names of all commands of a parser, the commands of a command after its own name."""
    groups = [action for action in command_line._actions if isinstance(action, argparse._SubParsersAction)]
    names = []
    for name, command in ((name, command) for group in groups for name, command in group.choices.items()):
        names += [f"{name} {inner}" for inner in names_of(command)] or [name]
    return names


def test_the_table_has_every_command():
    assert sorted(names_of(parser.make_parser())) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_handler_that_is_there(command):
    handler = parser.find_handler(parse(*command.split(), *COMMANDS[command]).handler)
    assert callable(handler)
    assert handler.__doc__


@pytest.mark.parametrize("command", ["train", "launch", "verify", "chaos", "plan", "sweep", "data inspect"])
def test_every_command_on_an_experiment_takes_the_same_selection(command):
    options = parse(
        *command.split(), *COMMANDS[command], "--devices", "2", "--strategy", "fsdp", "--reduction", "mean",
        "--max-steps", "3", "--set", "a=1", "b=2", "--set", "c=3", "--traceback",
    )  # fmt: skip
    assert (options.devices, options.strategy, options.reduction, options.max_steps) == (2, "fsdp", "mean", 3)
    assert options.assignments == ["a=1", "b=2", "c=3"]
    assert options.traceback


@pytest.mark.parametrize(("text", "value"), [("best", "best"), ("last", "last"), ("30", "30")])
def test_a_checkpoint_is_a_word_or_a_step(text, value):
    assert parse("eval", RUN, "--checkpoint", text).checkpoint == value


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["train"],
        ["train", X, "--devices", "0"],
        ["train", X, "--max-steps", "-3"],
        ["train", X, "--max-steps", "many"],
        ["train", X, "--reduction", "sum"],
        ["train", X, "--no-such-option"],
        ["eval", RUN, "--checkpoint", "newest"],
        ["eval", RUN, "--checkpoint", "-3"],
        ["train", X, "--run-dir", ""],
        ["eval", ""],
        ["leave", ""],
        ["plan", X],
        ["data"],
    ],
)
def test_a_bad_command_line_is_the_users_mistake(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        main.run(arguments)
    assert raised.value.code == 2
    assert "usage: jaxdist" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train", "x.py"], ["launch", "x.py"]])
def test_a_misspelt_option_gets_the_nearest(command, capsys):
    with pytest.raises(SystemExit) as raised:
        parser.make_parser().parse_args([*command, "--devcies=8"])
    assert raised.value.code == 2
    shown = capsys.readouterr().err
    assert f"usage: jaxdist {command[0]}" in shown
    assert "unrecognized arguments: --devcies=8. Did you mean '--devices'?" in shown


@pytest.mark.parametrize("given", ["log_every=1", "--optimizer.learning_rate=0.1"])
def test_a_setting_without_set_is_told_where_it_goes(given, capsys):
    with pytest.raises(SystemExit) as raised:
        parser.make_parser().parse_args(["train", "x.py", "--devices", "1", given])
    assert raised.value.code == 2
    assert f"Settings of the experiment follow --set: --set {given.lstrip('-')}." in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as raised:
        main.run(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"jaxdist {importlib.metadata.version('jaxdist')}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_commands(shell, capsys):
    with pytest.raises(SystemExit) as raised:
        main.run(["--print-completion", shell])
    assert raised.value.code == 0
    script = capsys.readouterr().out
    assert all(word in script for name in COMMANDS for word in name.split())


def test_completion_without_its_extra_says_what_to_install(capsys, monkeypatch):
    def missing(module, *, extra):
        raise extras.MissingExtra(f"{module} is not installed: pip install 'jaxdist[{extra}]'.")

    monkeypatch.setattr(extras, "require", missing)
    with pytest.raises(SystemExit) as raised:
        main.run(["--print-completion", "bash"])
    assert raised.value.code == 2
    assert capsys.readouterr().err == "jaxdist: shtab is not installed: pip install 'jaxdist[completion]'.\n"


def test_help_loads_neither_jax_nor_numpy_and_takes_less_than_half_a_second():
    """Processor time, because the wall time depends on what else runs here."""
    code = (
        "import sys\n"
        "from jaxdist.cli import main as cli\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'jax', 'jaxlib', 'numpy', 'flax', 'optax', 'orbax', 'rich', 'pydantic'}, loaded\n"
    )
    for arguments in (["--help"], ["train", "--help"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
        assert "usage: jaxdist" in done.stdout
