import io

import pytest

from jaxdist.launch import waiting


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "silent", "expected"),
    [(Terminal(), False, "loading ...\r\x1b[K"), (Terminal(), True, ""), (io.StringIO(), False, "")],
    ids=["terminal", "silent", "file"],
)
def test_a_terminal_gets_a_word_that_is_erased_again(monkeypatch, stream, silent, expected):
    monkeypatch.setattr("sys.stderr", stream)
    with waiting.shown("loading", silent=silent):
        pass
    assert stream.getvalue() == expected
