import argparse
import dataclasses
import os
import subprocess

import pytest
import tiny_experiment

from jaxdist.cli import parser, selected_experiment
from jaxdist.config import hidden_settings
from jaxdist.rundir import record


@dataclasses.dataclass(frozen=True)
class Store:
    key: str = dataclasses.field(default="k1", repr=False)
    bucket: str = "b"
    options: dict = dataclasses.field(default_factory=lambda: {"secret_key": "k2", "region": "r"})


@dataclasses.dataclass(frozen=True)
class Settings:
    store: Store = Store()
    api_key: str = "k3"


SECRET = ["store.key=k1 x", "api_key=k3", "store.options.secret_key=k2"]
OPEN = ["store.bucket=b", "store.options.region=r"]


def test_the_command_line_of_a_run_record_shows_no_secret():
    assignments = [*SECRET, *OPEN]
    options = argparse.Namespace(assignments=assignments, arguments=["train", "x.py", "--set", *assignments])
    command = selected_experiment.shown_command(options, Settings())
    hidden = "'store.key=***' 'api_key=***' 'store.options.secret_key=***' store.bucket=b store.options.region=r"
    assert command == f"jaxdist train x.py --set {hidden}"


def test_the_settings_of_a_run_record_show_no_secret():
    settings = record.plain(Settings())
    assert settings["api_key"] == "***"
    assert settings["store"]["options"] == {"secret_key": "***", "region": "r"}
    assert "k1" not in str(settings)
    assert record.plain({"pad_token": "<pad>", "max_tokens": 8, "password": 7, "has_secret": True}) == {
        "pad_token": "<pad>",
        "max_tokens": 8,
        "password": "***",
        "has_secret": True,
    }


def options_of(assignments):
    namespace = argparse.Namespace(assignments=assignments, strategy=None, reduction=None, max_steps=None)
    namespace.arguments = ["train", "x.py", "--set", *assignments]
    return namespace


def test_the_secrets_that_arguments_hide_come_from_the_environment(monkeypatch):
    monkeypatch.setenv(hidden_settings.SECRETS, '{"api_key=***": "api_key=k3"}')
    options = argparse.Namespace(assignments=["api_key=***"], strategy="fsdp", reduction=None, max_steps=7)
    assert selected_experiment.assignments(options) == ["api_key=k3", "strategy=fsdp", "stop.max_steps=7"]


@pytest.mark.parametrize("as_json", [True, False])
def test_with_json_native_code_and_other_programs_write_to_standard_error(capfd, as_json):
    with selected_experiment.record_alone_on_stdout(argparse.Namespace(json=as_json)):
        print("of Python")
        os.write(1, b"of native code\n")
        subprocess.run(["echo", "of a command"], check=True, timeout=200)
    print("the record")
    shown = "of Python\nof native code\nof a command\n"
    assert capfd.readouterr() == (("the record\n", shown) if as_json else (f"{shown}the record\n", ""))


def test_a_setting_with_several_values_is_told_and_the_last_counts():
    words = ["train", tiny_experiment.__file__, "--set", "seed=3", "stop.max_steps=9", "--set", "seed=4"]
    options = parser.make_parser().parse_args([*words, "--max-steps", "9"])
    with pytest.warns(UserWarning, match="sets seed to 2 values; the last one counts"):
        experiment = selected_experiment.load(options)
    assert (experiment.seed, experiment.stop.max_steps) == (4, 9)
