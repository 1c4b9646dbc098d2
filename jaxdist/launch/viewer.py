"""Training continues without its viewer: a closed pipe, terminal or log loses output, but never ends the run.

Output that can no longer be shown (`| head -1`, a closed terminal) continues in a file of the run directory. Output
that cannot be stored (a log on a full disk) is dropped.
"""

import contextlib
import errno
import os
import pathlib
import sys
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ESTALE)


class Viewer:
    """Guards standard output and standard error while it is entered; inside another one it has the word.

    Attributes:
      log: the file for output that can no longer be shown; None drops the output.
    """

    def __init__(self) -> None:
        self.log: pathlib.Path | None = None
        self._streams = contextlib.ExitStack()

    def __enter__(self) -> "Viewer":
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stream = sys.stdout if redirect is contextlib.redirect_stdout else sys.stderr
            if stream is None:  # closed by the shell: `>&-`
                stream = self._streams.enter_context(open(os.devnull, "w"))
            bare = stream.stream if isinstance(stream, _Guarded) else stream
            self._streams.enter_context(redirect(_Guarded(bare, self)))
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # of a stream that replaced ours, and is not guarded
                stream.flush()
        self._streams.close()

    def take_over(self, descriptor: int) -> None:
        """Send everything written to `descriptor`, also by native code, to the log from now on."""
        with contextlib.suppress(OSError):
            log = self._open()
            os.dup2(log, descriptor)
            os.close(log)

    def _open(self) -> int:
        with contextlib.suppress(OSError):
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                return os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


class _Guarded:
    """A text stream whose writes never raise an OSError, nor an error for a character that it cannot show."""

    def __init__(self, stream: TextIO, viewer: Viewer):
        self.stream, self._viewer = stream, viewer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write `text`, to the log if the viewer is closed."""
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:  # a file's name that is no text here, or a stream that takes ASCII only
            return self.stream.write(text.encode(self.stream.encoding, "backslashreplace").decode(self.stream.encoding))
        except OSError as error:
            self._lost(error)
            if getattr(self.stream, "write_through", False):  # no buffer still holds the text
                with contextlib.suppress(OSError):
                    self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, to the log if the viewer is closed."""
        try:
            self.stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        # Text that a buffered stream could not write is still in its buffer, and is written to the log first.
        if error.errno in _GONE:
            self._viewer.take_over(self.stream.fileno())
        with contextlib.suppress(OSError):
            self.stream.flush()
