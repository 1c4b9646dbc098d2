"""The page of a plan: complete in itself, never over a file of the user's; and, with a browser, what it draws."""

import dataclasses
import html.parser
import re
import shutil
import subprocess
import tempfile

import pytest
from plan_cases import plan

from jaxdist import errors
from jaxdist.plan import device_sweep, search
from jaxdist.plan.showing import plan_page, plan_text


class Page(html.parser.HTMLParser):
    """Collects a page's elements, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attributes]

    def handle_data(self, data):
        self.text += data


def made_plan(**changes):
    hostile = {"experiment": "<b>a & b", "delivered_examples_per_second": 1234.0, "steps": 3600}
    return dataclasses.replace(plan()[1], **hostile | changes)


def page_of(made):
    return plan_page.of_plan(made, plan_text.render(made), price_per_hour=2.0)


def test_the_page_loads_nothing_and_runs_nothing():
    page = Page(plan_page.render(page_of(made_plan())))
    assert "script" not in page.tags
    assert "b" in page.tags  # of the page's own
    assert [each for each in page.attributes if each[1] in ("src", "href", "srcset", "action", "data")] == []
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert "url(" not in plan_page.render(page_of(made_plan()))
    assert "<b>a & b on cpu:8" in page.text


def test_the_page_says_what_the_text_says():
    made = made_plan(device_memory=plan()[1].bytes.total - 1)
    page = Page(plan_page.render(page_of(made)))
    assert "does not fit, 1 B too much" in page.text
    assert "1,234 examples/s" in page.text
    assert "at 2 an hour" in page.text
    assert made.buffers[0].shape in page.text
    assert page.text.count("Sent by each device") == 3
    assert "model, not measured" in Page(plan_page.render(page_of(made_plan(measured_rates=False)))).text


def test_a_search_and_a_sweep_have_pages_of_their_own():
    _, made = plan()
    refused = search.Candidate(("strategy=tensor",), None, "No rules\nfor it.")
    good = search.Candidate(("strategy=fsdp",), made)
    found = Page(plan_page.render(plan_page.of_search([good, refused], "text")))
    assert "refused: No rules" in found.text
    assert plan_page.of_search([refused], "text") is None
    assert "100%" in Page(plan_page.render(plan_page.of_sweep(device_sweep.rows([made]), "text"))).text


def test_an_older_plan_is_replaced_and_any_other_file_kept(tmp_path):
    out = tmp_path / "plan.html"
    assert plan_page.write(page_of(made_plan()), out) == out.stat().st_size < 100_000
    plan_page.write(page_of(made_plan()), out)
    (tmp_path / "mine.html").write_text("mine")
    for wrong, message in ((tmp_path / "mine.html", "is not a plan"), (tmp_path / "none" / "x.html", "must exist")):
        with pytest.raises(errors.UserError, match=message):
            plan_page.write(page_of(made_plan()), wrong)
    assert (tmp_path / "mine.html").read_text() == "mine"


@pytest.mark.browser
def test_a_browser_draws_the_page(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "install Chromium"
    out = tmp_path / "plan.html"
    plan_page.write(page_of(made_plan()), out)
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        picture = tmp_path / "plan.png"
        options = {"check": True, "capture_output": True, "timeout": 120, "text": True}
        subprocess.run([*command, f"--screenshot={picture}", "--window-size=1280,2400", out.as_uri()], **options)
        shown = subprocess.run([*command, "--dump-dom", out.as_uri()], **options).stdout
    assert picture.stat().st_size > 50_000, "an empty page is smaller"
    assert len(re.findall(r'<circle class="step"', shown)) == 1
