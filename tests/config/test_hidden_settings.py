import dataclasses
import os
import subprocess
import sys

import pytest

from jaxdist.config import hidden_settings
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


def test_a_process_of_the_job_gets_a_secret_that_its_arguments_do_not_show(monkeypatch):
    monkeypatch.delenv(hidden_settings.SECRETS, raising=False)
    assert hidden_settings.for_other_machines() == {}
    given = [*SECRET, *OPEN]
    arguments = hidden_settings.hide(given, Settings(), ["train", "x.py", "--set", *given])
    assert not any(secret in " ".join(arguments) for secret in ("k1", "k2", "k3"))
    assert hidden_settings.reveal(arguments[3:]) == given
    environment = str(dict(os.environ))
    assert not any(secret in environment for secret in ("k1 x", "=k2", "=k3")), "nor does its environment"
    script = "import sys; from jaxdist.config import hidden_settings as h; print(h.reveal(sys.argv[1:]))"
    command = [sys.executable, "-c", script, *arguments[3:]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{given}\n"
    for name, value in hidden_settings.for_other_machines().items():
        monkeypatch.setenv(name, value)
    assert hidden_settings.reveal(arguments[3:]) == given
    assert hidden_settings.without(given, Settings()) == OPEN


def test_a_batch_script_holds_no_secret():
    hidden_settings.refuse(OPEN, Settings(), "A batch script")
    with pytest.raises(UserError, match=r"A batch script must hold no secret; got api_key\. Have"):
        hidden_settings.refuse(["api_key=k3", *OPEN], Settings(), "A batch script")


@pytest.mark.parametrize("name", ["token", "hub.token", "hub_token", "API_KEY", "db.password", "client_secret"])
def test_a_name_that_ends_like_a_secret_is_one(name):
    assert record.is_secret(name)


@pytest.mark.parametrize("name", ["pad_token", "eos_token", "tokenizer", "max_tokens", "data.bos_token", "secretary"])
def test_words_of_a_vocabulary_are_no_secrets(name):
    assert not record.is_secret(name)
