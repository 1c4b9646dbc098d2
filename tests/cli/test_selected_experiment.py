import argparse
import dataclasses

import pytest

from jaxdist.cli import selected_experiment
from jaxdist.errors import UserError
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


def test_a_process_of_the_job_gets_a_secret_that_its_arguments_do_not_show(monkeypatch):
    monkeypatch.setenv(selected_experiment.SECRETS, "{}")
    given = options_of([*SECRET, *OPEN])
    arguments = selected_experiment.hide_secrets(given, Settings(), given.arguments)
    assert not any(secret in " ".join(arguments) for secret in ("k1", "k2", "k3"))
    child = options_of(arguments[3:])
    assert selected_experiment.assignments(child) == given.assignments
    assert selected_experiment.without_secrets(child, Settings()) == OPEN
    assert selected_experiment.without_secrets(given, Settings()) == OPEN


def test_an_engine_is_handed_no_secret():
    selected_experiment.refuse_secrets(options_of(OPEN), Settings())
    with pytest.raises(UserError, match=r"must hold no secret; got api_key\. Have"):
        selected_experiment.refuse_secrets(options_of(["api_key=k3", *OPEN]), Settings())


@pytest.mark.parametrize("name", ["token", "hub.token", "hub_token", "API_KEY", "db.password", "client_secret"])
def test_a_name_that_ends_like_a_secret_is_one(name):
    assert record.is_secret(name)


@pytest.mark.parametrize("name", ["pad_token", "eos_token", "tokenizer", "max_tokens", "data.bos_token", "secretary"])
def test_words_of_a_vocabulary_are_no_secrets(name):
    assert not record.is_secret(name)
