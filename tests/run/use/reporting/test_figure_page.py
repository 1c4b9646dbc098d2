"""A chart as a page: complete in itself, its text escaped, and never over a file of the user's."""

import pytest

from jaxdist import errors
from jaxdist.run.use.reporting import figure_page

FIGURE = ("<Loss>", [{"x": [1, 2], "y": [3.0, 4.0], "name": "</script>"}], {"xaxis": {"type": "log"}})


def test_a_page_has_its_data_and_loads_nothing(tmp_path):
    out = tmp_path / "x.html"
    figure_page.check(out)
    figure_page.write(out, title="a <b>", said="it & that", figures=[FIGURE, FIGURE])
    page = out.read_text()
    assert "<title>a &lt;b&gt;</title>" in page
    assert "<h2>&lt;Loss&gt;</h2>" in page
    assert '"name":"\\u003c/script>"' in page
    assert "default-src 'none'" in page
    assert 'id="figure-1"' in page
    figure_page.check(out)  # it is replaced by the next


def test_a_file_of_another_kind_is_kept(tmp_path):
    (tmp_path / "mine.html").write_text("mine")
    for name in ("mine.html", "nowhere/x.html"):
        with pytest.raises(errors.UserError) as told:
            figure_page.check(tmp_path / name)
        assert "--out" not in str(told.value)  # these commands call it --plot


def test_axes_make_room_for_their_labels_and_keep_their_settings():
    found = figure_page.axes_of({"xaxis": {"type": "log"}, "title": "t"})
    assert found["xaxis"]["type"] == "log"
    assert found["xaxis"]["automargin"]
    assert found["title"] == "t"
