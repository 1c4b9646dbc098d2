"""Weights & Biases, the real package without a network: what is in the file that it would send."""

import json
import types

import numpy as np
import pytest
import wandb

from jaxdist import errors
from jaxdist.rundir import rich_values, writers


def test_an_offline_run_has_the_rows_the_config_and_what_is_no_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    writers.check(("wandb",))
    (writer,) = writers.make_writers(tmp_path, ("wandb",), name="x", config={"seed": 7})
    writer.write(1, {"train/loss": 0.5, "seconds": 1.25})
    writer.write_rich(
        1,
        {
            "mine/image": rich_values.Image(np.zeros((4, 4))),
            "mine/histogram": rich_values.Histogram([1.0, 2.0]),
            "mine/table": rich_values.Table(("a",), [(1,), ("b",)]),
            "mine/text": rich_values.Text("<b>a text"),
        },
    )
    writer.close()
    assert "failed" not in capsys.readouterr().err
    wandb.teardown()  # waits until the process of W&B has written what it was sent
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    identifier = (tmp_path / "wandb-id.txt").read_text()
    assert folder.name.endswith(identifier)
    content = (folder / f"run-{identifier}.wandb").read_bytes()
    for expected in (b"train/loss", b"seed", b"mine/histogram"):
        assert expected in content
    media = folder / "files" / "media"
    assert len(list((media / "images").rglob("*.png"))) == 1
    (table,) = (media / "table").rglob("*.json")
    assert json.loads(table.read_text())["data"] == [[1], ["b"]]
    (text,) = (media / "html").rglob("*.html")
    assert "&lt;b&gt;a text" in text.read_text()


@pytest.mark.parametrize("login", [False, ConnectionError("no\n route.")])
def test_a_run_that_would_not_be_let_in_is_refused_before_it_begins(monkeypatch, login):
    def log_in(*, prompt):
        assert prompt is False
        if isinstance(login, Exception):
            raise login
        return login

    monkeypatch.setattr(wandb, "setup", lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online")))
    monkeypatch.setattr(wandb, "login", log_in)
    why = "no route" if login else "no API key is known here"
    with pytest.raises(
        errors.UserError, match=rf"needs to log in; {why}\. Run `wandb login`, or set WANDB_MODE=offline"
    ):
        writers.check(("wandb",))
