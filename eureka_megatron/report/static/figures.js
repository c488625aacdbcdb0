// Sections that are charts: curves, phases, filter.

const figures = { smoothing: 1, stage: null };

function lineTraces(stage, name, smoothing) {
  return runs.flatMap((run, place) => {
    const values = seriesOf(run, stage, name);
    if (!values) return [];
    const known = values.flatMap((value, at) => (value === null ? [] : [at]));
    const own = { x: known.map((at) => run.stages[stage].steps[at]), name: plain(names()[place]), mode: known.length > 60 ? "lines" : "lines+markers" };
    const line = { color: palette(place), width: 1.6, dash: place ? "dot" : "solid" };
    const raw = { ...own, y: known.map((at) => values[at]), line, marker: { size: 4 } };
    if (smoothing <= 1) return [raw];
    return [{ ...raw, mode: "lines", opacity: 0.25, hoverinfo: "skip" }, { ...own, mode: "lines", y: smooth(raw.y, smoothing), line }];
  });
}

function legend() {
  if (runs.length < 2) return null;
  return el("p", { class: "legend" }, names().map((name, place) => el("span", { class: "run-" + place }, name)));
}

function curves(holder) {
  const stages = stagesOf();
  if (!stages.length) return holder.append(el("p", {}, "No step has been logged yet."));
  figures.stage ??= stages[0];
  const search = el("input", { type: "search", placeholder: "part of a name", "aria-label": "metrics whose name holds", "data-filter": true });
  const body = el("div");
  const fill = () => {
    body.replaceChildren();
    const all = [...new Set(runs.flatMap((run) => Object.keys(run.stages[figures.stage]?.series ?? {})))].sort();
    const chosen = all.filter((name) => name.includes(search.value));
    const heads = [...new Set(chosen.map((name) => name.split("/")[0]))];
    const first = ["train", "eval", "rollout"];
    heads.sort((one, other) => (first.indexOf(one) + 1 || 9) - (first.indexOf(other) + 1 || 9) || one.localeCompare(other));
    for (const head of heads) {
      const own = chosen.filter((name) => name.split("/")[0] === head);
      const grid = el("div", { class: "grid" });
      const fold = el("details", { open: true }, el("summary", {}, `${head} `, el("small", {}, `${own.length}`)), grid);
      grid.append(...own.map((name) => chart(name, () => lineTraces(figures.stage, name, figures.smoothing))));
      body.append(fold);
    }
    if (!chosen.length) body.append(el("p", {}, "No metric has such a name."));
  };
  search.addEventListener("input", fill);
  holder.append(el("div", { class: "tools" }, search,
    stages.length > 1 ? choice("stage", stages.map((stage) => [stage, stage]), figures.stage, (stage) => { figures.stage = stage; fill(); }) : null,
    choice("running mean of", [[1, "1 step"], [10, "10 steps"], [50, "50 steps"]], figures.smoothing, (width) => { figures.smoothing = Number(width); redraw(); })),
  rangeTools(), legend() ?? "", body);
  fill();
}

function phases(holder) {
  holder.append(rangeTools());
  runs.forEach((run, place) => {
    const stage = run.stages.train ? "train" : Object.keys(run.stages)[0];
    const own = run.stages[stage];
    const phaseNames = Object.keys(own?.series ?? {}).filter((name) => name.startsWith("time/"));
    if (runs.length > 1) holder.append(el("h3", {}, names()[place]));
    if (!phaseNames.length) return holder.append(el("p", {}, "No phase has been logged yet."));
    const short = (name) => plain(name.slice(5));
    holder.append(
      chart("seconds of a step", () => phaseNames.map((name, index) => ({
        type: "bar", x: own.steps, y: own.series[name], name: short(name), marker: { color: palette(index) } })),
      { height: 260, layout: { showlegend: true, bargap: 0.1 } }),
      chart("lanes: each phase at its hour", () => lanes(own, phaseNames),
        { place: hourOf(own, phaseNames), height: 60 + 34 * phaseNames.length, layout: { barmode: "overlay", hovermode: "closest", xaxis: { title: { text: "hours since the first step began" } }, yaxis: { automargin: true, fixedrange: true }, margin: { l: 70, r: 8, t: 4, b: 40 } },
          note: "laid one after another before the end of their step; overlaps are not known" }));
  });
}

const took = (own, phaseNames, at) => phaseNames.reduce((sum, name) => sum + (own.series[name][at] ?? 0), 0);
const startOf = (own, phaseNames) => (own.times[0] ?? 0) - took(own, phaseNames, 0);

// Step → hours until it began, for the range that all charts share.
function hourOf(own, phaseNames) {
  return (step) => {
    const next = own.steps.findIndex((other) => other >= step);
    const at = next < 0 ? own.steps.length - 1 : next;
    return (own.times[at] - (next < 0 ? 0 : took(own, phaseNames, at)) - startOf(own, phaseNames)) / 3600;
  };
}

function lanes(own, phaseNames) {
  const start = startOf(own, phaseNames);
  const ends = own.times.map((time, at) => time - took(own, phaseNames, at));
  return phaseNames.map((name, index) => {
    const bars = { x: [], base: [], y: [], customdata: [] };
    own.times.forEach((time, at) => {
      const length = own.series[name][at];
      if (length === null || time === null) return;
      bars.x.push(length / 3600);
      bars.base.push((ends[at] - start) / 3600);
      bars.y.push(plain(name.slice(5)));
      bars.customdata.push([own.steps[at], length]);
      ends[at] += length;
    });
    return { type: "bar", orientation: "h", ...bars, name: plain(name), marker: { color: palette(index) }, hovertemplate: "step %{customdata[0]}: %{customdata[1]:.3g} s<extra></extra>" };
  });
}

function filter(holder) {
  holder.append(rangeTools());
  runs.forEach((run, place) => {
    const own = run.stages.train;
    if (runs.length > 1) holder.append(el("h3", {}, names()[place]));
    if (!own?.series["filter/mixed"]) return holder.append(el("p", {}, "No rollouts have been logged yet."));
    const of = (name) => own.series["filter/" + name];
    const outcomes = [["all_wrong", "all wrong", 1], ["mixed", "mixed", 2], ["all_right", "all right", 0]];
    const sums = own.steps.map((_, at) => outcomes.reduce((sum, [name]) => sum + (of(name)?.[at] ?? 0), 0));
    const degenerate = own.steps.map((_, at) => (sums[at] ? ((of("all_wrong")[at] ?? 0) + (of("all_right")[at] ?? 0)) / sums[at] : null));
    const line = (name, y, index) => ({ x: own.steps, y, name, mode: "lines", line: { color: palette(index), width: 1.6 } });
    const equal = own.series["train/rewards_differ"]?.map((value) => (value === null ? null : 1 - value));
    const skipped = (of("skipped") ?? []).reduce((sum, value) => sum + (value ?? 0), 0);
    holder.append(
      el("p", {}, `${skipped} of ${own.steps.length} steps were skipped because too few groups were left.`),
      el("div", { class: "grid wide" },
        chart("groups sampled in a step", () => outcomes.map(([name, text, index]) => ({ type: "bar", x: own.steps, y: of(name), name: text, marker: { color: palette(index) } })),
          { height: 240, layout: { showlegend: true, bargap: 0.1 } }),
        chart("degenerate groups: share that teaches nothing", () => [line("all right or all wrong, of those sampled", degenerate, 3),
          ...(equal ? [line("equal rewards, of those trained on", equal, 4)] : [])], { height: 240, layout: { showlegend: true, yaxis: { range: [-0.02, 1.02], fixedrange: true } } }),
        chart("kept, reused, dropped", () => [["kept", 2], ["from_buffer", 0], ["in_buffer", 5], ["dropped_old", 1]].filter(([name]) => of(name)).map(([name, index]) => line(plain(name.replace("_", " ")), of(name), index)),
          { height: 240, layout: { showlegend: true } })));
  });
}
