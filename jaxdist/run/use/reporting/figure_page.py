"""One chart as a page: a file of HTML that needs no network, as the report, for figures that are no run."""

import html
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdist import errors
from jaxdist.run.use.reporting import report_page
from jaxdist.rundir import files

_PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="jaxdist report">
<meta http-equiv="Content-Security-Policy" content="$policy">
<title>$title</title>
<style>
$style
.figure { height: 460px; }
</style>
</head>
<body>
<header class="top"><h1>$title</h1><p class="quiet">$said</p></header>
<main>$figures</main>
<footer class="quiet">Charts: Plotly.js, MIT License, © Plotly, Inc.</footer>
<script type="application/json" id="data">$data</script>
<script type="application/octet-stream" id="library">$library</script>
<script>
"use strict";
(async () => {
  const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (each) => each.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  const figures = JSON.parse(document.getElementById("data").textContent);
  await Promise.all(figures.map(({ traces, layout }, index) => Plotly.newPlot(`figure-${index}`, traces, {
    margin: { l: 8, r: 10, t: 8, b: 8 }, hovermode: "closest",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    legend: { orientation: "h", y: -0.22 }, ...layout,
  }, { responsive: true, displayModeBar: false })));
  document.documentElement.dataset.charts = figures.length;
})().catch((error) => { document.documentElement.dataset.error = String(error); });
</script>
</body>
</html>
""")


def write(
    out: pathlib.Path,
    *,
    title: str,
    said: str,
    figures: Sequence[tuple[str, Sequence[Mapping[str, Any]], Mapping[str, Any]]],
) -> None:
    """Write a page with charts, each a heading, Plotly's traces and layout; an earlier page of ours is replaced.

    Raises:
      UserError: `out` is a file of another kind, its folder does not exist, or Plotly is not installed.
    """
    with errors.as_user_error():
        files.write_text(out, make(title=title, said=said, figures=figures))


def check(out: pathlib.Path) -> None:
    """Raise UserError where `write` could not, before the work that it shows."""
    report_page.check_output(out, of="page", option="--plot")
    report_page.library()


def make(
    *, title: str, said: str, figures: Sequence[tuple[str, Sequence[Mapping[str, Any]], Mapping[str, Any]]]
) -> str:
    """Return the page."""
    content = [{"traces": list(traces), "layout": axes_of(layout)} for _, traces, layout in figures]
    cards = "".join(
        f'<section><h2>{html.escape(heading)}</h2><div class="card"><div class="figure" id="figure-{index}"></div>'
        "</div></section>"
        for index, (heading, _, _) in enumerate(figures)
    )
    return _PAGE.safe_substitute(
        title=html.escape(title),
        said=html.escape(said),
        figures=cards,
        style=report_page.text_of("page.css"),
        policy=report_page.policy(live=False),
        data=report_page.for_script(content),
        library=report_page.library(),
    )


def axes_of(layout: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layout whose axes make room for their labels."""
    return {
        name: {"automargin": True, "gridcolor": "#dfe3e8", "exponentformat": "power", **value}
        if "axis" in name
        else value
        for name, value in layout.items()
    }
