"""A server of files on this machine, for tests: a dict of contents, and what was asked for."""

import collections
import contextlib
import http.server
import threading
from collections.abc import Iterator


class Files:
    """The contents by path; `fail` answers the next requests for content with a status, `cut` ends them early.

    Where `stalls`, half of a content is sent, and then nothing until the block ends.
    """

    def __init__(self):
        self.contents: dict[str, bytes] = {}
        self.asked: collections.Counter[str] = collections.Counter()
        self.fail: list[int] = []
        self.cut = False
        self.stalls = False
        self.ended = threading.Event()
        self.url = ""


@contextlib.contextmanager
def serving() -> Iterator[Files]:
    """Serve files on 127.0.0.1 in the block."""
    files = Files()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_content=False)

        def do_GET(self):
            files.asked[self.path] += 1
            self.answer(with_content=True)

        def answer(self, with_content):
            content = files.contents.get(self.path)
            status = 404 if content is None else 200
            if with_content and content is not None and files.fail:
                status = files.fail.pop(0)
            self.send_response(status)
            body = content if status == 200 else b""
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", str(hash(body)))
            self.end_headers()
            if with_content:
                self.wfile.write(body[: len(body) // 2] if files.cut or files.stalls else body)
                if files.stalls:
                    self.wfile.flush()
                    files.ended.wait()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    files.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield files
    finally:
        files.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
