"""The live report: what its server answers, to this machine alone."""

import contextlib
import http.client
import json
import subprocess
import threading

import pytest
from reported_runs import write_run

from jaxdist import errors
from jaxdist.run.use.reporting import live_page, report_page


@contextlib.contextmanager
def served(*run_dirs):
    with live_page.serve(run_dirs) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(server, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_the_page_follows_its_run(tmp_path):
    run_dir = write_run(tmp_path / "a", end_reason=None)
    with served(run_dir) as server:
        assert server.server_address[0] == "127.0.0.1"
        status, page = get(server, "/")
        version = live_page.version([run_dir])
        assert (status, f'<body data-live="{version}">' in page, "connect-src 'self'" in page) == (200, True, True)
        assert get(server, f"/update.json?since={version}") == (204, "")
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 9, "examples_seen": 90, "seconds": 9.0, "train/loss": 0.125}) + "\n")
        status, text = get(server, f"/update.json?since={version}")
        update = json.loads(text)
        assert (status, update["version"]) == (200, live_page.version([run_dir]))
        assert update["runs"][0]["curves"]["train/loss"]["steps"][-1] == 9
        assert set(update["parts"]) == set(report_page.content([run_dir])["parts"])
        assert get(server, "/etc/passwd")[0] == 404


@pytest.mark.parametrize("host", ["example.org:80", "127.0.0.1.example.org:80", ""])
def test_a_page_of_another_site_gets_nothing(tmp_path, host):
    with served(write_run(tmp_path / "a")) as server:
        assert get(server, "/", Host=host)[0] == 403


def test_a_port_that_is_taken_is_one_message(tmp_path):
    run_dir = write_run(tmp_path / "a")
    with served(run_dir) as server:
        for port in (server.server_port, 70_000):
            with pytest.raises(errors.UserError, match=f"{port} is none: [^.]*[.] Name another"):
                live_page.serve([run_dir], port)


@pytest.mark.browser
def test_a_browser_shows_what_came_after_the_page(tmp_path, monkeypatch):
    run_dir = write_run(tmp_path / "a", end_reason=None)
    make = report_page.make

    def make_and_go_on(*arguments, **options):
        page = make(*arguments, **options)
        row = {"step": 9, "examples_seen": 90, "seconds": 9.0, "train/newcomer": 0.125}
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        return page

    monkeypatch.setattr(report_page, "make", make_and_go_on)
    with served(run_dir) as server:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        address = f"http://127.0.0.1:{server.server_port}/"
        command += ["--virtual-time-budget=15000", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "data-error" not in done.stdout
    assert "<h3>newcomer" in done.stdout
