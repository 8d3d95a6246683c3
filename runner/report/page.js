"use strict";
const {charts, runs, datasets, grids, palette} = JSON.parse(document.getElementById("data-of-page").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)"), $ = id => document.getElementById(id);
const table = $("table"), body = table.tBodies[0];

const legend = {orientation: "h", yref: "container", yanchor: "bottom", y: 0};

// Plotly reads texts as HTML.
const escaped = text => String(text).replace(/[&<>"']/g, sign => `&#${sign.charCodeAt(0)};`);

function withTheme(layout) {
  const text = dark.matches ? "#e8eaed" : "#1b1e23", line = dark.matches ? "#363b44" : "#d9dce1";
  const axis = {gridcolor: line, linecolor: line, zerolinecolor: line};
  return {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: text, family: "system-ui, sans-serif"},
    margin: {l: 60, r: 20, t: 30, b: 60}, modebar: {bgcolor: "rgba(0,0,0,0)", color: line, activecolor: text},
    legend, ...layout,
    xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis}};
}
// Numbers on a heat map must be legible on its darkest and lightest cells in both color schemes.
function withColorscale(trace) {
  if (trace.type !== "heatmap") return trace;
  const full = dark.matches ? "47, 91, 208" : "120, 160, 250";
  return {...trace, colorscale: [[0, `rgba(${full}, 0.04)`], [1, `rgb(${full})`]],
    textfont: {color: dark.matches ? "#e8eaed" : "#1b1e23"}};
}
function draw(chart) {
  Plotly.react(chart.id, chart.data.map(withColorscale), withTheme(chart.layout), {responsive: true, displaylogo: false});
}

// The table: rows that the filter hides are not drawn either; the box in a row overlays the run's curves.
const rows = () => [...body.rows];
const visible = () => new Set(rows().filter(row => !row.hidden).map(row => +row.dataset.run));
const overlaid = () => new Set(rows().filter(row => !row.hidden && row.querySelector("input").checked).map(row => +row.dataset.run));
function filter() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean), paper = $("paper").value;
  for (const row of rows()) {
    const text = row.textContent.toLowerCase();
    row.hidden = (paper && row.dataset.paper !== paper) || !words.every(word => text.includes(word));
  }
  $("count").textContent = `${visible().size} of ${runs.length} runs`;
  drawVisible();
}
const value = cell => { const text = cell.textContent.replace(/,/g, "").trim(), n = parseFloat(text); return isNaN(n) ? text : n; };
function sortBy(head, column) {
  const rising = head.getAttribute("aria-sort") !== "ascending";
  table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  rows().sort((a, b) => {
    const [x, y] = [value(a.cells[column]), value(b.cells[column])];
    if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; // a missing value comes last, in either direction
    const order = x < y ? -1 : x > y ? 1 : 0;
    return rising ? order : -order;
  }).forEach(row => body.append(row));
}

// The Pareto front: points that no other beats in both accuracy and cost, by rising cost.
function paretoFront(points) {
  let best = -Infinity;
  return points.toSorted((a, b) => a.cost - b.cost || b.accuracy - a.accuracy)
    .filter(point => point.accuracy > best && (best = point.accuracy, true));
}
const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3});
// 1, 2 and 5 of every power of ten, or over many powers 1 alone: plotly's own labels are bare digits.
function logTicks(low, high) {
  const ticks = [], digits = high - low > 3 ? [1] : [1, 2, 5];
  for (let power = Math.floor(low); power <= high; power++)
    for (const digit of digits) {
      const tick = +`${digit}e${power}`;
      if (Math.log10(tick) >= low && Math.log10(tick) <= high) ticks.push(tick);
    }
  return {tickmode: "array", tickvals: ticks, ticktext: ticks.map(tick => compact.format(tick))};
}
const size = run => run.parameters ? 8 + 6 * Math.sqrt(run.parameters / 1e6) : 10;
function scatter(points, name, symbol, labeled, best, [low, high]) {
  // At the edges of the chart, a name is written inward.
  const side = cost => { const share = (Math.log10(cost) - low) / (high - low); return share < 0.25 ? "right" : share > 0.75 ? "left" : "center"; };
  return {type: "scatter", mode: "markers+text", name, x: points.map(point => point.cost), y: points.map(point => point.accuracy),
    text: points.map(point => labeled.has(point) ? escaped(point.run.name) : ""), cliponaxis: false,
    textposition: points.map(point => `${best.indexOf(point) % 2 > 0 ? "bottom" : "top"} ${side(point.cost)}`),
    customdata: points.map(point => [escaped(point.run.name), point.run.parameters ? point.run.parameters.toLocaleString("en") : "not counted"]),
    marker: {symbol, size: points.map(point => size(point.run)), color: points.map(point => palette[point.run.position % palette.length]), opacity: 0.85, line: {width: 2}},
    hovertemplate: "%{customdata[0]}<br>%{y:.2f} %, %{x:,}<br>%{customdata[1]} parameters<extra></extra>"};
}
// The points whose names have room beside those before them.
function withRoom(points) {
  const span = values => Math.max(...values) - Math.min(...values) || 1;
  const x = points.map(point => Math.log10(point.cost)), y = points.map(point => point.accuracy);
  const near = (i, j) => Math.abs(x[i] - x[j]) < (span(x) + 0.6) / 3 && Math.abs(y[i] - y[j]) < span(y) / 12;
  const labeled = [];
  for (const i of points.keys()) if (!labeled.some(j => near(i, j))) labeled.push(i);
  return labeled.map(i => points[i]);
}
// One chart for each dataset; the front is that of complete runs, and incomplete ones have another marker.
function drawTradeoff() {
  const cost = $("cost"), inTable = visible();
  for (const [number, dataset] of datasets.entries()) {
    const points = runs.filter(run => run.dataset === dataset && inTable.has(run.position) && run[cost.value] > 0 && run.test_accuracy !== null)
      .map(run => ({run, cost: run[cost.value], accuracy: 100 * run.test_accuracy}));
    const complete = points.filter(point => !point.run.incomplete), incomplete = points.filter(point => point.run.incomplete);
    // Latencies of different machines are not comparable: each machine has a front of its own.
    const machines = [...new Set(complete.map(point => cost.value.endsWith("_ms") ? point.run.machine : ""))];
    const fronts = machines.map(machine => paretoFront(complete.filter(point => !machine || point.run.machine === machine)));
    const best = fronts.flat(), labeled = new Set(withRoom([...best, ...(points.length > 12 ? [] : points)]));
    const costs = points.map(point => Math.log10(point.cost)), range = [Math.min(...costs) - 0.3, Math.max(...costs) + 0.3];
    const lines = fronts.map((front, index) => ({type: "scatter", mode: "lines",
      name: machines.length > 1 ? `Pareto front on ${escaped(machines[index])}` : "Pareto front",
      x: front.map(point => point.cost), y: front.map(point => point.accuracy),
      line: {dash: "dot", width: 2, color: palette[(9 + index) % palette.length], shape: "hv"}, hoverinfo: "skip"}));
    if (!points.length) {
      draw({id: `tradeoff-${number}`, data: [], layout: {height: 120, xaxis: {visible: false}, yaxis: {visible: false},
        annotations: [{text: "None of these runs has both values.", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5}]}});
      continue;
    }
    const traces = [...(complete.length ? [...lines, scatter(complete, "complete", "circle", labeled, best, range)] : []),
      ...(incomplete.length ? [scatter(incomplete, "incomplete", "circle-open", labeled, best, range)] : [])];
    draw({id: `tradeoff-${number}`, data: traces, layout: {showlegend: true, ...withLegend(machines.length), height: 396 + 24 * machines.length,
      xaxis: {title: {text: cost.selectedOptions[0].textContent + " (log)"}, type: "log", range, ...logTicks(...range)}, yaxis: {title: {text: "test accuracy, %"}}}});
  }
}
// Room below the x-axis for a legend of so many lines; of more than ten, the rest is scrolled to.
function withLegend(lines) {
  const height = 24 * Math.min(Math.max(lines, 1), 10);
  return {height: 340 + height, margin: {l: 60, r: 20, t: 30, b: 60 + height}, legend: {...legend, maxheight: height}};
}
function drawCurves() {
  const selected = overlaid();
  for (const chart of charts.filter(chart => chart.id.startsWith("curve-")))
    draw({...chart, data: chart.data.filter(trace => selected.has(trace.run)), layout: {...chart.layout, ...withLegend(selected.size)}});
}
function drawVisible() { drawTradeoff(); drawCurves(); }

// Heat maps: mean accuracy over all runs that share two values.
function drawGrid(grid, number) {
  const [x, y] = [$(`grid-${number}-x`).value, $(`grid-${number}-y`).value];
  const means = grid.factors[y].map(down => grid.factors[x].map(across => {
    const accuracies = grid.cells.filter(cell => cell[x] === across && cell[y] === down).map(cell => cell.accuracy);
    const count = accuracies.length;
    return count ? {mean: 100 * accuracies.reduce((a, b) => a + b) / count, count} : null;
  }));
  draw({id: `grid-${number}`, data: [{type: "heatmap", x: grid.factors[x].map(escaped), y: grid.factors[y].map(escaped), showscale: false,
    z: means.map(row => row.map(cell => cell && cell.mean)), text: means.map(row => row.map(cell => cell ? cell.mean.toFixed(2) : "")),
    customdata: means.map(row => row.map(cell => cell ? cell.count : 0)), texttemplate: "%{text}",
    hovertemplate: `${x} %{x}<br>${y} %{y}<br>%{z:.2f} %, mean of %{customdata} runs<extra></extra>`}],
    layout: {xaxis: {title: {text: x}, type: "category", automargin: true}, yaxis: {title: {text: y}, type: "category", automargin: true}}});
}

function drawAll() {
  drawVisible();
  const reported = charts.find(chart => chart.id === "reported");
  if (reported) draw(reported);
  grids.forEach(drawGrid);
  for (const chart of charts.filter(chart => chart.id.startsWith("search-")))
    draw({...chart, layout: {...chart.layout, showlegend: true, ...withLegend(2)}});
  // A confusion matrix is drawn once its run is opened.
  for (const run of runs)
    if (run.confusion && $(`run-${run.position}`).open) draw(run.confusion);
}
for (const run of runs)
  $(`run-${run.position}`).addEventListener("toggle", event => { if (event.target.open && run.confusion) draw(run.confusion); });
function openTarget() {
  const target = location.hash.startsWith("#run-") && $(location.hash.slice(1));
  if (target) { target.open = true; target.scrollIntoView(); }
}
addEventListener("hashchange", openTarget);
table.querySelectorAll("th").forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => sortBy(head, column)));
$("filter").addEventListener("input", filter);
$("paper").addEventListener("change", filter);
$("cost").addEventListener("change", drawTradeoff);
body.addEventListener("change", drawCurves);
for (const [id, checked] of [["all", true], ["none", false]])
  $(id).addEventListener("click", () => { rows().forEach(row => { if (!row.hidden) row.querySelector("input").checked = checked; }); drawCurves(); });
grids.forEach((grid, number) => ["x", "y"].forEach(axis => $(`grid-${number}-${axis}`).addEventListener("change", () => drawGrid(grid, number))));
dark.addEventListener("change", drawAll);
drawAll();
openTarget();
