"use strict";
// Draws the charts of the report. The page is complete in itself: nothing is fetched, but for a live page from its server.

const root = document.documentElement;
let runs = JSON.parse(document.getElementById("data").textContent);
let sweep = JSON.parse(document.getElementById("sweep").textContent);
const hidden = new Set();
const OPTIMIZER = ["learning_rate", "grad_norm"], SPEED = "examples_per_second";
const DASHES = ["solid", "dot", "dash", "dashdot"], SYMBOLS = ["circle", "diamond", "square", "triangle-up", "x"];
const AXES = { steps: "step", examples: "examples", seconds: "seconds of training" };

const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
const runColor = (number) => color(`run-${number % 8}`);
const control = (id) => document.getElementById(id);
const across = () => document.querySelector("input[name=x]:checked").value;
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// The library is stored compressed, so that the page stays small.
async function loadLibrary() {
  const packed = Uint8Array.from(atob(control("library").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(make("script", { textContent: await new Response(stream).text() }));
  control("library").remove();
}

// An average with weights that fall by a factor, corrected for its start; gaps stay.
function smooth(values, factor) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = factor * sum + (1 - factor) * value;
    weight = factor * weight + (1 - factor);
    return sum / weight;
  });
}

const prefix = (name) => name.slice(0, Math.max(name.lastIndexOf("/"), 0));
const short = (name) => name.slice(name.lastIndexOf("/") + 1);

// The metrics of all runs by the last part of their name: train/loss and eval/loss share a chart.
function groups() {
  const found = new Map();
  for (const run of runs) for (const name of Object.keys(run.curves)) {
    const group = short(name);
    if (!found.has(group)) found.set(group, new Set());
    found.get(group).add(name);
  }
  return [...found].sort(([a], [b]) => (b === "loss") - (a === "loss"));
}

function place(group) {
  return group === SPEED ? "speed" : OPTIMIZER.includes(group) ? "optimizer" : "metrics";
}

// One run: a color for each set of data. Several: a color for each run, a dash for each set of data.
function look(number, names, name) {
  const sets = ["train", ...[...names].map(prefix).filter((each) => each !== "train")];
  const set = name === SPEED ? 0 : sets.indexOf(prefix(name));
  const alone = runs.length === 1, train = prefix(name) === "train" || name === SPEED;
  const dash = alone ? "solid" : train ? DASHES[Math.floor(number / 8) % 4] : set <= 1 ? "dash" : DASHES[(set % 3) + 1];
  return { color: runColor(alone ? set : number), dash, marked: !train, symbol: SYMBOLS[set % SYMBOLS.length] };
}

function traces(names) {
  const factor = Number(control("smoothing").value), axis = across(), found = [];
  runs.forEach((run, number) => {
    if (hidden.has(number)) return;
    for (const name of names) {
      const curve = run.curves[name];
      if (!curve || !curve[axis]) continue;
      const style = look(number, names, name), smoothed = factor > 0 && !style.marked && curve.values.length > 4;
      const label = plain(runs.length === 1 ? prefix(name) || name : `${run.name} ${prefix(name)}`);
      const few = style.marked && curve.values.length <= 60 || curve.values.length === 1;
      const trace = {
        x: curve[axis], y: curve.values, name: label, type: "scatter", mode: few ? "lines+markers" : "lines",
        line: { color: style.color, dash: style.dash, width: style.marked ? 2.2 : 1.7 },
        marker: { size: 6, symbol: style.symbol, color: style.color }, hovertemplate: "%{y:.5g}", connectgaps: false,
      };
      if (smoothed) found.push({ ...trace, opacity: 0.22, hoverinfo: "skip", hovertemplate: null });
      found.push(smoothed ? { ...trace, y: smooth(curve.values, factor), line: { ...trace.line, width: 2.2 } } : trace);
    }
  });
  return found;
}

function layout(more = {}) {
  const grid = { gridcolor: color("grid"), linecolor: color("line"), zeroline: false, automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "x unified",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("quiet") },
    margin: { l: 8, r: 10, t: 8, b: 8 }, hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("text") } },
    xaxis: { ...grid, ...xaxis }, yaxis: { ...grid, ...yaxis }, ...rest,
  };
}

const OPTIONS = { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" };

function curveLayout() {
  const kind = (id) => (control(id).checked ? "log" : "linear");
  return layout({
    xaxis: { type: kind("log-x"), title: { text: AXES[across()], font: { size: 12 }, standoff: 6 } },
    yaxis: { type: kind("log-y"), exponentformat: "power" },
    uirevision: [across(), control("log-x").checked, control("log-y").checked].join(),
  });
}

function keys(names) {
  return [...names].map((name) => {
    const style = look(0, names, name), stroke = runs.length === 1 ? style.color : color("quiet");
    const dashes = { solid: "", dash: "6 3", dot: "2 3", dashdot: "6 3 2 3" }[style.dash];
    const key = make("span", { className: "key" });
    key.innerHTML = `<svg viewBox="0 0 22 8"><path d="M0 4H22" stroke="${stroke}" stroke-width="2" stroke-dasharray="${dashes}"/>` +
      (style.marked ? `<circle cx="11" cy="4" r="3" fill="${stroke}"/>` : "") + "</svg>";
    key.append(prefix(name) || "all");
    return key;
  });
}

// Returns the plot of a chart and makes it on first use: a live page draws again into the same element.
function chart(section, id, title, notes = [], kind = "") {
  const box = document.querySelector(`[data-charts=${section}] .charts`);
  let card = [...box.children].find((child) => child.dataset.id === id);
  if (!card) {
    card = make("div", { className: "card chart" }, make("h3"), make("div", { className: `figure ${kind}` }));
    card.dataset.id = id;
    box.append(card);
  }
  card.firstChild.replaceChildren(title, ...notes);
  card.dataset.drawn = "yes";
  return card.lastChild;
}

function drawCurves(plots) {
  for (const [group, names] of groups()) {
    const section = place(group), data = traces(names);
    const title = group === SPEED ? "examples per second" : group.replaceAll("_", " ");
    const notes = names.size > 1 || section === "metrics" ? keys(names) : [];
    const plot = chart(section, group, title, notes);
    plots.push(() => Plotly.react(plot, data, curveLayout(), OPTIONS));
  }
}

function drawConfusion(plots) {
  runs.forEach((run, number) => {
    if (hidden.has(number)) return;
    for (const [where, counts] of Object.entries(run.confusion)) {
      const names = counts.map((_, index) => plain(run.classes[index] ?? String(index)));
      const shares = counts.map((row) => row.map((count) => count / Math.max(1, row.reduce((a, b) => a + b, 0))));
      const total = counts.flat().reduce((a, b) => a + b, 0), right = counts.reduce((sum, row, index) => sum + row[index], 0);
      const data = [{
        type: "heatmap", z: shares, x: names, y: names, zmin: 0, zmax: 1, xgap: 1, ygap: 1, showscale: false,
        colorscale: [[0, color("back")], [0.02, color("live-back")], [1, color("heat")]],
        text: counts.map((row) => row.map((count) => (count ? String(count) : ""))), customdata: counts,
        texttemplate: counts.length <= 20 ? "%{text}" : undefined,
        hovertemplate: "%{customdata} examples of %{y} taken for %{x}, %{z:.1%} of them<extra></extra>",
      }];
      const title = runs.length > 1 ? `${run.name}, ${where}` : where;
      const note = make("span", { textContent: `${right.toLocaleString("en")} of ${total.toLocaleString("en")} right` });
      const plot = chart("evaluations", `${number} ${where}`, title, [note], "square");
      plots.push(() => Plotly.react(plot, data, layout({
        hovermode: "closest",
        xaxis: { title: { text: "taken for", standoff: 6 }, type: "category", showgrid: false, constrain: "domain" },
        yaxis: { title: { text: "label", standoff: 6 }, type: "category", autorange: "reversed", showgrid: false, scaleanchor: "x", constrain: "domain" },
      }), OPTIONS));
    }
  });
}

function drawStaleness(plots) {
  const data = runs.map((run, number) => ({ run, number })).filter(({ run, number }) => run.staleness && !hidden.has(number))
    .map(({ run, number }) => ({
      type: "bar", name: plain(run.name), x: Object.keys(run.staleness).map(Number), y: Object.values(run.staleness),
      marker: { color: runColor(number) }, hovertemplate: "%{y:,} updates",
    }));
  if (!data.length) return;
  const note = make("span", { textContent: "updates made since the params were pulled" });
  const plot = chart("staleness", "staleness", "staleness", [note]);
  plots.push(() => Plotly.react(plot, data, layout({
    xaxis: { title: { text: "staleness", standoff: 6 }, dtick: data.every(({ x }) => Math.max(...x) <= 20) ? 1 : undefined },
    yaxis: { title: { text: "updates", standoff: 6 } }, bargap: 0.25,
  }), OPTIONS));
}

// A color between two, given as #rrggbb.
function between(from, to, share) {
  const channel = (hex, at) => parseInt(hex.slice(at, at + 2), 16);
  return "#" + [1, 3, 5].map((at) => Math.round(channel(from, at) + share * (channel(to, at) - channel(from, at)))
    .toString(16).padStart(2, "0")).join("");
}

// Parallel coordinates of a sweep. Plotly's own need WebGL and eval; these are lines.
function drawSweep(plots) {
  if (!sweep || !sweep.lines.length) return;
  const places = sweep.axes.map((_, index) => index), last = places.length - 1;
  const data = sweep.lines.map(({ y, quality, text }) => ({
    x: places, y, type: "scatter", mode: "lines+markers", marker: { size: 6 }, hoverlabel: { align: "left" },
    line: { color: between(color("line"), color("heat"), 0.15 + 0.85 * quality ** 2), width: quality === 1 ? 3.5 : 1.8 },
    text: y.map(() => text.map(plain).join("<br>")), hovertemplate: "%{text}<extra></extra>",
  }));
  const shown = (text) => (text.length > 14 ? `${text.slice(0, 13)}…` : text);
  const annotations = sweep.axes.flatMap(({ name, ticks }, x) => [
    { x, y: 1.13, text: `<b>${plain(shown(name))}</b>`, showarrow: false, font: { size: 12, color: color("text") } },
    ...ticks.map(([y, text]) => ({
      x, y, text: plain(shown(text)), showarrow: false, xanchor: x === last ? "left" : "right", xshift: x === last ? 9 : -9,
      font: { size: 11 }, bgcolor: color("card"), opacity: 0.9,
    })),
  ]);
  const shapes = places.map((x) => ({ type: "line", x0: x, x1: x, y0: -0.04, y1: 1.04, line: { color: color("quiet"), width: 1 } }));
  const plot = chart("sweep", "sweep", `${sweep.lines.length} trials`, [], "tall");
  plots.push(() => Plotly.react(plot, data, layout({
    hovermode: "closest", annotations, shapes, margin: { l: 56, r: 56, t: 8, b: 8 },
    xaxis: { visible: false, range: [-0.12, last + 0.12] }, yaxis: { visible: false, range: [-0.08, 1.2] },
  }), OPTIONS));
}

// Removes charts that were not drawn this time, and hides sections without content.
function tidy() {
  for (const card of document.querySelectorAll(".chart")) {
    if (!card.dataset.drawn) { Plotly.purge(card.lastChild); card.remove(); }
    delete card.dataset.drawn;
  }
  for (const section of document.querySelectorAll("[data-charts]")) section.hidden = !section.querySelector(".chart");
  for (const section of document.querySelectorAll("[data-part-section]")) section.hidden = !section.querySelector("[data-part] *");
}

// All cards stand in their places before the first chart takes its width.
async function draw() {
  const plots = [];
  drawSweep(plots); drawCurves(plots); drawConfusion(plots); drawStaleness(plots);
  tidy();
  await Promise.all(plots.map((plot) => plot()));
  root.dataset.charts = document.querySelectorAll(".chart").length;
}

function listRuns() {
  const box = control("shown");
  box.hidden = runs.length < 2;
  box.replaceChildren(box.firstElementChild, ...runs.map((run, number) => {
    const input = make("input", { type: "checkbox", checked: !hidden.has(number) });
    input.addEventListener("change", () => { input.checked ? hidden.delete(number) : hidden.add(number); draw(); });
    const swatch = make("i", { className: "swatch" });
    swatch.style.background = `var(--run-${number % 8})`;
    swatch.style.marginRight = "0";
    return make("label", {}, input, swatch, run.name);
  }));
}

function listen() {
  for (const input of document.querySelectorAll(".controls input")) {
    input.addEventListener("input", () => {
      control("smoothing-value").textContent = Number(control("smoothing").value);
      draw();
    });
  }
  control("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    draw();
  });
  document.addEventListener("click", async ({ target }) => {
    if (!target.matches("[data-copy]")) return;
    const code = target.previousElementSibling;
    try { await navigator.clipboard.writeText(code.textContent); target.textContent = "Copied"; } catch {
      getSelection().selectAllChildren(code);
      target.textContent = "Selected";
    }
    setTimeout(() => { target.textContent = "Copy"; }, 1500);
  });
}

// A live page asks its server what is new; the server answers 204 where nothing is.
async function follow(version) {
  for (;;) {
    await new Promise((done) => setTimeout(done, 2000));
    let answer;
    try { answer = await fetch(`update.json?since=${version}`); } catch {
      control("made").textContent = "The server has ended; this is its last state.";
      return;
    }
    if (answer.status !== 200) continue;
    const update = await answer.json();
    version = update.version;
    runs = update.runs;
    sweep = update.sweep;
    for (const [part, html] of Object.entries(update.parts)) document.querySelector(`[data-part=${part}]`).innerHTML = html;
    control("made").textContent = update.made;
    listRuns();
    await draw();
  }
}

async function main() {
  root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const { live } = document.body.dataset;
  await loadLibrary();
  listRuns();
  listen();
  await draw();
  if (live) follow(live);
}

window.addEventListener("error", (event) => { root.dataset.error = event.message; });
main().catch((error) => { root.dataset.error = String(error); throw error; });
