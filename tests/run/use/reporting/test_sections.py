"""The tables of the report: every fact of the record, and no HTML from a name."""

import html.parser

import pytest
from reported_runs import KILLED, SERVERS, write_run

from jaxdist.run.use.reporting import run_data, sections


class Words(html.parser.HTMLParser):
    """Collects the texts, and checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.found.append(data)


def words(text):
    parser = Words()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return " ".join(" ".join(parser.found).split())


def made(tmp_path, *names, **fields):
    runs = run_data.read([write_run(tmp_path / name, **fields) for name in names])
    return {
        part: words(text) for part, text in sections.sections(runs, {"optimizer.learning_rate": [0.1, 1.0]}).items()
    }


def test_the_tables_say_what_the_record_says(tmp_path):
    extra = {
        "ps": SERVERS,
        "peak_memory_bytes": {"0": 3 << 30, "10": 1 << 20},
        "git": {"commit": "c" * 40, "dirty": True},
    }
    extra |= {
        "best": {"metric": "eval/accuracy", "value": 0.8125, "step": 2},
        "host": "h",
        "started": "2026-11-01T10:20:30",
    }
    parts = made(tmp_path, "a", "b", extra=extra, events=KILLED, restarts=1)
    for phrase in (
        "✓ max_steps",
        "eval/accuracy 0.8125 at step 2",
        "1,234 examples/s",
        "12.5 ms, 95 % below 500 ms",
        "jaxdist train x.py --set a=1 Copy",
        "Commit cccccccccccc , with changes that are not in it",
    ):
        assert phrase in parts["runs"]
    assert "train/loss 0.5 0.5" in parts["metrics"]
    assert "confusion" not in parts["metrics"]
    assert "compute 6 s 60.0 %" in parts["time"]
    assert "0 0 s 30 s process 1 killed by SIGKILL 2" in parts["restarts"]
    assert "device 0 3 GiB 3 GiB device 10 1 MiB 1 MiB" in parts["memory"]
    assert "backups that took over 1 1" in parts["servers"]
    assert "optimizer.learning_rate 0.1 1" in parts["differences"]
    assert "versions.jax 0.10.2" in parts["settings"]


def test_restarts_are_shown_with_what_they_cost(tmp_path):
    change = {"kind": "restart", "step": 1200, "processes": 2, "seconds_lost": 2.5}
    parts = made(tmp_path, "a", extra={"changes": [change]})
    assert "restart 1,200 2 2.5 s" in parts["restarts"]


def test_parts_with_nothing_to_say_are_empty(tmp_path):
    parts = made(tmp_path, "a")
    assert [part for part, text in parts.items() if not text] == ["restarts", "servers", "differences"]


@pytest.mark.parametrize(("ended", "mark"), [("error", "✕"), ("preempted", "↻"), ("patience", "✓")])
def test_how_a_run_ended_is_a_sign_and_a_word(tmp_path, ended, mark):
    assert f"{mark} {ended}" in made(tmp_path, "a", end_reason=ended)["runs"]


def test_names_cannot_bring_markup(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    run_dir = write_run(tmp_path / name, metrics={name: 1.0}, config={name: name}, command=f"jaxdist train '{name}'")
    (run_dir / "nonfinite.txt").write_text(name)
    text = "".join(sections.sections(run_data.read([run_dir]), {}).values())
    assert "<img" not in text
    assert text.count("&lt;img") == words(text).count(name) > 5


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (0.00018, "0.18 ms"), (12.34, "12.3 s"), (59.97, "1 min 0 s"), (7384, "2 h 3 min")],
)
def test_durations_are_for_people(seconds, shown):
    assert sections.seconds_in_words(seconds) == shown


def test_sizes_are_for_people():
    assert [sections.bytes_in_words(count) for count in (512, 1536, 5 << 40)] == ["512 B", "1.5 KiB", "5 TiB"]
