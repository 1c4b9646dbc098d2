"""The live report: a page that follows runs while they train, served on this machine only."""

import functools
import http.server
import json
import pathlib
import urllib.parse
from collections.abc import Sequence
from http import HTTPStatus

from jaxdist import errors
from jaxdist.launch.supervising import restart_events
from jaxdist.run.sweeps import sweep_record
from jaxdist.run.use import run_list
from jaxdist.run.use.reporting import report_page, run_data
from jaxdist.rundir import record, writers

HOST = "127.0.0.1"
_WATCHED = (record.FILE_NAME, writers.JSONL_NAME, restart_events.EVENTS_NAME)


def serve(run_dirs: Sequence[pathlib.Path], port: int = 0) -> http.server.ThreadingHTTPServer:
    """Return a server of the report on `run_dirs`, on the loopback interface; the caller runs and closes it.

    Raises:
      UserError: a directory has no run, Plotly is not installed, or the port is taken.
    """
    run_data.read(sweep_record.expand(run_dirs))  # errors are reported here, before the page is opened
    report_page.library()
    try:
        return http.server.ThreadingHTTPServer((HOST, port), functools.partial(_Handler, run_dirs))
    except (OSError, OverflowError) as error:
        reason = str(error).rstrip(".")
        raise errors.UserError(
            f"The report needs a free port of {HOST}; {port} is none: {reason}. Name another, or leave --port out for "
            "any free one."
        ) from error


def version(run_dirs: Sequence[pathlib.Path]) -> str:
    """Return a text that changes whenever a report on `run_dirs` changes, from the state of the files it reads."""
    parts = []
    for run_dir in sweep_record.expand(run_dirs):
        for name in _WATCHED:
            path = run_dir / name
            found = path.stat() if path.exists() else None
            parts.append(f"{found.st_mtime_ns}-{found.st_size}" if found else "0")
        parts.append(run_list.how_ended(run_dir, record.RunRecord.read(run_dir)))
    return ".".join(parts)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests for the page, and for its changes since a version."""

    def __init__(self, run_dirs: Sequence[pathlib.Path], *connection: object) -> None:
        self._run_dirs = run_dirs
        super().__init__(*connection)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer a request; the name is http.server's."""
        if not self._is_local():
            self.send_error(HTTPStatus.FORBIDDEN, "The report is served to this machine only.")
            return
        address = urllib.parse.urlsplit(self.path)
        now = version(self._run_dirs)
        if address.path == "/":
            self._answer("text/html; charset=utf-8", report_page.make(self._run_dirs, live=now))
        elif address.path != "/update.json":
            self.send_error(HTTPStatus.NOT_FOUND)
        elif urllib.parse.parse_qs(address.query).get("since") == [now]:
            self.send_response(HTTPStatus.NO_CONTENT)
            self.end_headers()
        else:
            self._answer("application/json", json.dumps({"version": now, **report_page.content(self._run_dirs)}))

    def _is_local(self) -> bool:
        """Return whether the request names this machine; a page of another site that reaches this port does not."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        return host in (HOST, "localhost")

    def _answer(self, kind: str, text: str) -> None:
        content = text.encode(errors="surrogateescape")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing: a line per request would hide the address of the page."""
