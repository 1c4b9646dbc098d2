import dataclasses

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
    monkeypatch.setenv(hidden_settings.SECRETS, "{}")
    given = [*SECRET, *OPEN]
    arguments = hidden_settings.hide(given, Settings(), ["train", "x.py", "--set", *given])
    assert not any(secret in " ".join(arguments) for secret in ("k1", "k2", "k3"))
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
