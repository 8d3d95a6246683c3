"use strict";
const {charts, runs, grids, palette} = JSON.parse(document.getElementById("data-of-page").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)"), $ = id => document.getElementById(id);
const table = $("table"), body = table.tBodies[0];

function themed(layout) {
  const ink = dark.matches ? "#e8eaed" : "#1b1e23", line = dark.matches ? "#363b44" : "#d9dce1";
  const axis = {gridcolor: line, linecolor: line, zerolinecolor: line};
  return {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: ink, family: "system-ui, sans-serif"},
    margin: {l: 60, r: 20, t: 30, b: 60}, legend: {orientation: "h", y: -0.3}, ...layout,
    xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis}};
}
// Numbers on a heat map must be read on its darkest and its lightest cell, on either paper.
function shaded(trace) {
  if (trace.type !== "heatmap") return trace;
  const full = dark.matches ? "47, 91, 208" : "120, 160, 250";
  return {...trace, colorscale: [[0, `rgba(${full}, 0.04)`], [1, `rgb(${full})`]],
    textfont: {color: dark.matches ? "#e8eaed" : "#1b1e23"}};
}
function draw(chart) {
  Plotly.react(chart.id, chart.data.map(shaded), themed(chart.layout), {responsive: true, displaylogo: false});
}

// The table: a filter hides rows, and what it hides is not drawn either; a box overlays a run's curves.
const rows = () => [...body.rows];
const shown = () => new Set(rows().filter(row => !row.hidden).map(row => +row.dataset.run));
const overlaid = () => new Set(rows().filter(row => !row.hidden && row.querySelector("input").checked).map(row => +row.dataset.run));
function filter() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean), paper = $("paper").value;
  for (const row of rows()) {
    const text = row.textContent.toLowerCase();
    row.hidden = (paper && row.dataset.paper !== paper) || !words.every(word => text.includes(word));
  }
  $("count").textContent = `${shown().size} of ${runs.length} runs`;
  drawShown();
}
const value = cell => { const text = cell.textContent.replace(/,/g, "").trim(), n = parseFloat(text); return isNaN(n) ? text : n; };
function sortBy(head, column) {
  const rising = head.getAttribute("aria-sort") !== "ascending";
  table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  rows().sort((a, b) => {
    const [x, y] = [value(a.cells[column]), value(b.cells[column])];
    const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1;
    return rising ? order : -order;
  }).forEach(row => body.append(row));
}

// What no other run beats both in accuracy and in cost, cheapest first.
function front(points) {
  let best = -Infinity;
  return points.toSorted((a, b) => a.cost - b.cost || b.accuracy - a.accuracy)
    .filter(point => point.accuracy > best && (best = point.accuracy, true));
}
function drawTradeoff() {
  const cost = $("cost"), seen = shown();
  const points = runs.filter(run => seen.has(run.position) && run[cost.value] !== null && run.test_accuracy !== null)
    .map(run => ({run, cost: run[cost.value], accuracy: 100 * run.test_accuracy}));
  const best = front(points), named = new Set(points.length > 12 ? best : points);
  const costs = points.map(point => point.cost), room = [Math.log10(Math.min(...costs)) - 0.3, Math.log10(Math.max(...costs)) + 0.3];
  const size = run => run.parameters ? 8 + 6 * Math.sqrt(run.parameters / 1e6) : 10;
  const dots = {type: "scatter", mode: "markers+text", x: costs, y: points.map(point => point.accuracy),
    text: points.map(point => named.has(point) ? point.run.name : ""), textposition: points.map(point => best.indexOf(point) % 2 > 0 ? "bottom center" : "top center"), showlegend: false,
    customdata: points.map(point => [point.run.name, point.run.parameters ? point.run.parameters.toLocaleString("en") : "not counted"]),
    marker: {size: points.map(point => size(point.run)), color: points.map(point => palette[point.run.position % palette.length]), opacity: 0.85},
    hovertemplate: "%{customdata[0]}<br>%{y:.2f} %, %{x:,}<br>%{customdata[1]} parameters<extra></extra>"};
  const line = {type: "scatter", mode: "lines", name: "Pareto front", x: best.map(point => point.cost), y: best.map(point => point.accuracy),
    line: {dash: "dot", width: 2, color: palette[9], shape: "hv"}, hoverinfo: "skip"};
  draw({id: "tradeoff", data: points.length ? [line, dots] : [], layout: {
    xaxis: {title: {text: cost.selectedOptions[0].textContent + " (log)"}, type: "log", ...(points.length && {range: room})},
    yaxis: {title: {text: "test accuracy, %"}},
    annotations: points.length ? [] : [{text: "none of these runs has both figures", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5}]}});
}
function drawCurves() {
  const over = overlaid();
  for (const chart of charts.filter(chart => chart.id.startsWith("curve-")))
    draw({...chart, data: chart.data.filter(trace => over.has(trace.run))});
}
function drawShown() { drawTradeoff(); drawCurves(); }

// Heat maps: mean accuracy over all runs that share two values.
function drawGrid(grid, number) {
  const [x, y] = [$(`grid-${number}-x`).value, $(`grid-${number}-y`).value];
  const means = grid.factors[y].map(down => grid.factors[x].map(across => {
    const found = grid.cells.filter(cell => cell[x] === across && cell[y] === down).map(cell => cell.accuracy);
    return found.length ? {mean: 100 * found.reduce((a, b) => a + b) / found.length, count: found.length} : null;
  }));
  draw({id: `grid-${number}`, data: [{type: "heatmap", x: grid.factors[x], y: grid.factors[y], showscale: false,
    z: means.map(row => row.map(cell => cell && cell.mean)), text: means.map(row => row.map(cell => cell ? cell.mean.toFixed(2) : "")),
    customdata: means.map(row => row.map(cell => cell ? cell.count : 0)), texttemplate: "%{text}",
    hovertemplate: `${x} %{x}<br>${y} %{y}<br>%{z:.2f} %, mean of %{customdata} runs<extra></extra>`}],
    layout: {xaxis: {title: {text: x}, type: "category", automargin: true}, yaxis: {title: {text: y}, type: "category", automargin: true}}});
}

function drawAll() {
  drawShown();
  const reported = charts.find(chart => chart.id === "reported");
  if (reported) draw(reported);
  grids.forEach(drawGrid);
  // Confusion matrices are drawn when their run is opened.
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
