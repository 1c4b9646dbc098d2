"""What `jaxdist launch` would start, and the combinations of options that have no meaning."""

import shlex

import pytest
import tiny_experiment

from jaxdist.cli import main

TINY = tiny_experiment.__file__
ON_HOSTS = ["--hosts", "2", "--host-index", "1", "--coordinator", "a:1", "--run-dir", "/shared/run"]


def launch(*arguments):
    return main.run(["launch", TINY, *arguments, "--dry-run"])


@pytest.mark.parametrize(
    ("arguments", "started"),
    [
        (["--processes", "3"], ["--processes", "3"]),
        (["--max-steps", "5", "--set", "seed=1"], ["--max-steps", "5", "--set", "seed=1", "--processes", "1"]),
        (ON_HOSTS, ["--run-dir", "/shared/run", "--restartable"]),
        (
            ["--strategy", "parameter-server", "--run-dir", "/shared/run"],
            ["--strategy", "parameter-server", "--run-dir", "/shared/run", "--strategy", "parameter-server"],
        ),
    ],
)
def test_a_dry_run_shows_the_command_of_a_process(arguments, started, capsys):
    assert launch(*arguments) == 0
    assert shlex.split(capsys.readouterr().out) == ["jaxdist", "train", TINY, *started]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "slurm", "--host-index", "0"], "leave --host-index and --coordinator out"),
        (["--with", "partition=gpu"], "got 'partition=gpu' and no --engine"),
        *[
            (ON_HOSTS[:index] + ON_HOSTS[index + 2 :], "Name them all, or an --engine.")
            for index in range(2, len(ON_HOSTS), 2)
        ],
        (["--strategy", "parameter-server", "--processes", "2"], "leave --processes out"),
        (["--strategy", "parameter-server", "--hosts", "2"], "Leave --hosts out"),
    ],
)
def test_options_without_a_meaning_are_refused(arguments, message, capsys):
    assert launch(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
