import pathlib

import pytest

from jaxdist.errors import UserError
from jaxdist.launch.engines import request as requests


def make(**changes):
    settings = {"name": "tiny", "experiment": pathlib.Path("x.py"), "arguments": ["--devices", "2"]}
    return requests.Request(**settings | {"run_dir": pathlib.Path("run")} | changes)


def test_every_process_runs_a_command_that_can_be_restarted():
    assert make().train() == ["train", "x.py", "--devices", "2", "--run-dir", "run", "--restartable"]
    assert (make().module, make(parameter_server=True).module) == ("jaxdist.cli", "jaxdist.cli.machine")


@pytest.mark.parametrize(
    ("settings", "required", "message"),
    [({"tim": "1"}, (), "time, image; 'tim' is none of them"), ({"time": "1"}, ("image",), "image is missing")],
)
def test_a_setting_that_is_unknown_or_missing_is_named(settings, required, message):
    with pytest.raises(UserError, match=message):
        make(settings=settings).only("X", ("time", "image"), required)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "tiny\ntouch here"},
        {"experiment": pathlib.Path("a\nb.py")},
        {"run_dir": pathlib.Path("run\r")},
        {"arguments": ["--set", "name=a\nb"]},
        {"settings": {"partition": "gpu\ntouch here"}},
    ],
)
def test_a_text_of_two_lines_is_refused(changes):
    with pytest.raises(UserError, match="one line of printable characters"):
        make(**changes)


def test_settings_are_key_and_value():
    assert requests.settings_of(["a=1", "b=", "c=x=y"]) == {"a": "1", "b": "", "c": "x=y"}
    for wrong in ("a", "=1", ""):
        with pytest.raises(UserError, match="KEY=VALUE"):
            requests.settings_of([wrong])
