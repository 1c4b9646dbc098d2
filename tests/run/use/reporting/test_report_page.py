"""The page: complete in itself, small, never over a file of the user's; and, with a browser, what it draws."""

import html.parser
import json
import os
import re
import shutil
import subprocess
import tempfile

import pytest
from reported_runs import KILLED, SERVERS, write_run

from jaxdist import errors, extras
from jaxdist.run.use.reporting import report_page


class Page(html.parser.HTMLParser):
    """Collects the attributes of a page's elements, and the texts of its scripts by id."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.scripts, self._script = [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *each) for each in attributes]
        self._script = dict(attributes).get("id", "") if tag == "script" else None

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[self._script] = data
            self._script = None


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The report on a run that was killed once and one of a parameter server, with hostile names."""
    folder = tmp_path_factory.mktemp("runs")
    hostile = write_run(folder / "<b>a & <!--script>", events=KILLED, rows=40)
    server = write_run(folder / "b", extra={"ps": SERVERS | {"staleness": {"0": 30, "1": 50}}}, config={"seed": 1})
    out = folder / "report.html"
    size = report_page.write([hostile, server], out)
    assert size == out.stat().st_size < 3_000_000
    return out


def test_the_page_loads_nothing(two):
    page = Page(two.read_text())
    assert [each for each in page.attributes if each[1] in ("src", "href", "srcset", "action", "data")] == []
    assert "url(" not in two.read_text().split("</style>")[0]
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; script-src")
    assert "connect-src" not in policy


def test_the_page_has_the_data_of_its_charts_and_the_library(two):
    scripts = Page(two.read_text()).scripts
    runs = json.loads(scripts["data"])
    assert [run["name"] for run in runs] == ["<b>a & <!--script>", "b"]
    assert runs[1]["staleness"] == {"0": 30, "1": 50}
    assert len(runs[0]["curves"]["train/loss"]["values"]) == 40
    assert scripts["library"] == report_page.library()


def test_each_part_and_chart_of_the_script_has_its_place(two):
    text = two.read_text()
    assert set(re.findall(r'data-part="(\w+)"', text)) == set(report_page.content([two.parent / "b"])["parts"])
    script = report_page.make([two.parent / "b"]).rpartition("<script>")[2]
    for place in ("speed", "optimizer", "metrics", "evaluations", "staleness"):
        assert f'data-charts="{place}"' in text
        assert f'"{place}"' in script
    for name in re.findall(r'control\("([\w-]+)"\)', script):
        assert f'id="{name}"' in text


def test_an_older_report_is_replaced_and_any_other_file_kept(tmp_path, two):
    run_dir = write_run(tmp_path / "a")
    shutil.copy(two, tmp_path / "old.html")
    report_page.write([run_dir], tmp_path / "old.html")
    (tmp_path / "mine.html").write_text("mine")
    for out, message in (
        ("mine.html", "is not a report, so it is not replaced"),
        ("none/x.html", "there is no"),
        ("a", "not replaced"),
    ):
        with pytest.raises(errors.UserError, match=message):
            report_page.write([run_dir], tmp_path / out)
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named_with_what_helps(tmp_path, monkeypatch):
    """By default it is the run directory, of another user for example."""
    run_dir = write_run(tmp_path / "a")
    monkeypatch.setattr(os, "access", lambda path, mode: path != run_dir)
    with pytest.raises(errors.UserError, match=r"must be writable; .*/a is not.*--out"):
        report_page.write([run_dir], run_dir / "report.html")
    report_page.write([run_dir], tmp_path / "report.html")


def test_a_run_that_is_not_there_is_named_and_not_the_folder_of_the_page(tmp_path):
    with pytest.raises(errors.UserError, match=r"needs run directories; .*/typo has no run.json"):
        report_page.write([tmp_path / "typo"], tmp_path / "typo" / "report.html")


def test_a_page_that_is_too_large_is_not_written(tmp_path):
    run_dir = write_run(tmp_path / "a", config={"x": "y" * 2_500_000})
    with pytest.raises(errors.UserError, match="4 MB at most"):
        report_page.write([run_dir], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_without_plotly_the_message_names_the_extra(tmp_path, monkeypatch):
    run_dir = write_run(tmp_path / "a")
    report_page.library.cache_clear()

    def missing(module, *, extra):
        raise extras.MissingExtra(f"{module} is not installed, it comes with the extra {extra!r}.")

    monkeypatch.setattr(extras, "require", missing)
    with pytest.raises(errors.UserError, match="extra 'report'"):
        report_page.write([run_dir], tmp_path / "x.html")


PROBE = """
<script>
addEventListener("load", async () => {
  const root = document.documentElement;
  while (!root.dataset.charts && !root.dataset.error) await new Promise((done) => setTimeout(done, 20));
  document.querySelector(CLICK)?.click();
  await new Promise((done) => setTimeout(done, 300));
  const boxes = [...document.querySelectorAll("main > section:not([hidden]) > *, .card, .figure")].filter((box) =>
    box.getClientRects().length && getComputedStyle(box).position !== "sticky");
  const overlaps = [];
  for (const one of boxes) for (const other of boxes) {
    if (one === other || one.contains(other) || other.contains(one)) continue;
    const a = one.getBoundingClientRect(), b = other.getBoundingClientRect();
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
      overlaps.push(`${one.className} over ${other.className}`);
  }
  for (const svg of document.querySelectorAll(".figure .main-svg")) {
    const room = svg.closest(".figure").clientWidth;
    if (svg.getBoundingClientRect().width > room + 1) overlaps.push("a chart over its card");
  }
  const plots = [...document.querySelectorAll("[data-charts=metrics] .figure")].map((plot) => plot._fullLayout);
  const found = {
    charts: [...document.querySelectorAll(".chart")].filter((card) => card.querySelector(".trace, .hm")).length,
    titles: [...document.querySelectorAll(".chart h3")].map((title) => title.firstChild.textContent),
    wide: root.scrollWidth > innerWidth, width: innerWidth, overlaps, error: root.dataset.error ?? null,
    axes: plots.map(({ xaxis, yaxis }) => [xaxis.title.text, yaxis.type]),
  };
  root.dataset.found = JSON.stringify(found);
});
</script>
"""


def look(page, width, click="#none"):
    """Return what headless Chromium shows of the page, after a click; chromium must be installed."""
    copy = page.with_name(f"probe-{width}.html")
    copy.write_text(page.read_text().replace("</body>", PROBE.replace("CLICK", json.dumps(click)) + "</body>"))
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={width},1000", "--virtual-time-budget=20000"]
        done = subprocess.run([*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr + done.stdout[-500:]
    return json.loads(html.unescape(found[1]))


TITLES = ["loss", "accuracy", "<b>a & <!--script>, eval", "b, eval", "grad norm", "examples per second", "staleness"]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 700])
def test_a_browser_draws_all_charts_and_nothing_overlaps(two, width):
    found = look(two, width)
    assert found["error"] is None
    assert (found["width"], found["wide"], found["overlaps"]) == (width, False, [])
    assert found["titles"] == TITLES
    assert found["charts"] == len(TITLES)
    assert found["axes"] == [["step", "linear"]] * 2


@pytest.mark.browser
@pytest.mark.parametrize(
    ("click", "axes"),
    [("input[value=seconds]", ["seconds of training", "linear"]), ("#log-y", ["step", "log"])],
    ids=["by time", "logarithmic"],
)
def test_a_browser_draws_again_when_an_axis_is_chosen(two, click, axes):
    found = look(two, 1000, click)
    assert found["error"] is None
    assert found["axes"] == [axes] * 2
