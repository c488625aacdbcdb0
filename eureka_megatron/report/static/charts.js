// Charts by plotly: drawn when they come into view; those over steps share one range.

let plotlyLoaded = null;
function loadPlotly() {
  plotlyLoaded ??= unpackText("plotly").then((text) => {
    const script = el("script");
    script.nonce = nonce;
    script.textContent = text;
    document.head.append(script);
  });
  return plotlyLoaded;
}

const drawn = new Map(); // element → its chart
let range = null; // of steps, shown by all charts; null: all
const rangeListeners = [];
const coarse = matchMedia("(pointer: coarse)").matches;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const palette = (place) => colour("series-" + (place % 8));
// plotly reads a little markup in its texts.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = drawn.get(entry.target);
    if (!chart) continue;
    chart.visible = entry.isIntersecting;
    if (chart.visible) draw(chart);
  }
}, { rootMargin: "200px" });

// traces: () => plotly traces, so that colours follow the theme. place: step → x, where the x axis is not of steps.
function chart(title, traces, { place = null, height = 190, layout = {}, note = "" } = {}) {
  const plot = el("div", { class: "plot", role: "img", "aria-label": `chart: ${title}`, style: `height:${height}px` });
  const holder = el("figure", { class: "chart" }, el("figcaption", {}, title, note ? el("small", {}, " " + note) : null), plot);
  drawn.set(plot, { plot, traces, place, layout, height, state: "" });
  watcher.observe(plot);
  return holder;
}

const shown = (chart) => range && range.map((step) => (chart.place ? chart.place(step) : step));

function layoutOf(chart) {
  const axis = { gridcolor: colour("line"), zeroline: false, linecolor: colour("line"), automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = chart.layout;
  return {
    height: chart.height, margin: { l: 44, r: 8, t: 4, b: 26 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("ink"), size: 11 }, hovermode: "x", dragmode: coarse ? false : "zoom", showlegend: false, barmode: "stack",
    hoverlabel: { bgcolor: colour("paper"), font: { color: colour("ink") } }, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: { ...axis, ...(range ? { range: shown(chart) } : { autorange: true }), ...xaxis }, yaxis: { ...axis, fixedrange: true, ...yaxis }, ...rest,
  };
}

async function draw(chart, force = false) {
  const wanted = JSON.stringify(range);
  if (!force && chart.state === wanted) return;
  const first = chart.state === "";
  chart.state = wanted;
  await loadPlotly();
  if (first || force) {
    await Plotly.react(chart.plot, chart.traces(), layoutOf(chart), { displayModeBar: false, responsive: true });
    if (first) chart.plot.on("plotly_relayout", (change) => relayout(chart, change));
  } else {
    await Plotly.relayout(chart.plot, range ? { "xaxis.range": shown(chart) } : { "xaxis.autorange": true });
  }
}

function relayout(chart, change) {
  if (chart.place) return;
  const given = change["xaxis.range"] ?? ("xaxis.range[0]" in change ? [change["xaxis.range[0]"], change["xaxis.range[1]"]] : null);
  if (given && JSON.stringify(given) !== JSON.stringify(range)) setRange(given);
  else if (change["xaxis.autorange"] && range) setRange(null);
}

function setRange(wanted) {
  range = wanted && wanted[0] < wanted[1] ? wanted.map((value) => Number(value.toPrecision(6))) : null;
  for (const chart of drawn.values()) if (chart.visible) draw(chart);
  rangeListeners.forEach((tell) => tell());
}

function lastStep() {
  return Math.max(1, ...runs.flatMap((run) => Object.values(run.stages).map((stage) => stage.steps.at(-1) ?? 0)));
}

// By keys: closer by a factor, or along by a share of what is shown.
function moveRange(factor, along) {
  const [first, last] = range ?? [0, lastStep()];
  const middle = (first + last) / 2 + along * (last - first);
  const half = ((last - first) / 2) * factor;
  setRange(factor > 1 && 2 * half >= lastStep() ? null : [Math.max(middle - half, -0.5), middle + half]);
}

function rangeTools() {
  const input = (place, label) => field(label, range?.[place], (text) => {
    const next = [...(range ?? [0, lastStep()])];
    next[place] = Number(text);
    setRange(next);
  }, { "data-place": place });
  const tools = el("div", { class: "tools", role: "group", "aria-label": "Steps shown" }, input(0, "from step"), input(1, "to step"),
    el("button", { click: () => moveRange(0.5, 0), title: "+" }, "closer"), el("button", { click: () => moveRange(2, 0), title: "-" }, "wider"),
    el("button", { click: () => setRange(null), title: "0" }, "all steps"));
  rangeListeners.push(() => tools.querySelectorAll("input").forEach((node) => (node.value = range ? range[node.dataset.place] : "")));
  return tools;
}

function redraw() {
  for (const chart of drawn.values()) if (chart.state !== "") draw(chart, true);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

// Paper shows what no one has scrolled to.
addEventListener("beforeprint", () => { for (const chart of drawn.values()) draw(chart); });

function smooth(values, width) {
  if (width <= 1) return values;
  const held = [];
  let sum = 0;
  return values.map((value) => {
    if (value === null) return null;
    held.push(value);
    sum += value;
    if (held.length > width) sum -= held.shift();
    return sum / held.length;
  });
}
