// Sections that are tables: overview, evaluation, configuration, faults and machines.

function overview(holder) {
  for (const run of runs) for (const problem of run.problems) holder.append(el("p", { class: "warning" }, `${run.name}: ${problem}`));
  runs.forEach((run, place) => {
    if (runs.length > 1) holder.append(el("h3", { class: "run-" + place }, names()[place]));
    const stages = Object.entries(run.stages);
    if (!stages.length) holder.append(el("p", {}, "No step has been logged yet."));
    for (const [stage, own] of stages) {
      const done = own.steps.at(-1) + 1;
      const known = own.times.filter((time) => time !== null);
      const facts = [`${done} of ${run.planned[stage] ?? "?"} steps`];
      if (known.length > 1) facts.push(`${seconds(known.at(-1))} from the first to the last`, `last at ${new Date((own.began + known.at(-1)) * 1000).toISOString().slice(0, 16).replace("T", " ")} UTC`);
      holder.append(el("p", {}, el("b", {}, `${stage}: `), facts.join(" · ")));
    }
    const wanted = ["train/reward", "train/accuracy_rewards", "rollout/reward", "eval/accuracy", "train/response_length", "train/logprob_abs_diff_max", "train/entropy", "sft/loss"];
    const rows = wanted.flatMap((name) => stagesOf().flatMap((stage) => {
      const values = (seriesOf(run, stage, name) ?? []).filter((value) => value !== null);
      return values.length ? [[name, values[0], values.at(-1), Math.min(...values), Math.max(...values)]] : [];
    }));
    if (rows.length) holder.append(table(["metric", "first", "last", "least", "most"], rows));
  });
  const drawn = ["train/reward", "train/accuracy_rewards", "train/response_length", "train/entropy", "sft/loss", "eval/accuracy"].flatMap((name) =>
    stagesOf().filter((stage) => runs.some((run) => seriesOf(run, stage, name))).map((stage) => chart(name, () => lineTraces(stage, name, 1))));
  holder.append(legend() ?? "", el("div", { class: "grid" }, drawn));
}

// 95 % interval of a share (Wilson).
function wilson(share, count) {
  const z = 1.96, middle = (share + (z * z) / (2 * count)) / (1 + (z * z) / count);
  const half = (z / (1 + (z * z) / count)) * Math.sqrt((share * (1 - share)) / count + (z * z) / (4 * count * count));
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

function percent(value, low, high) {
  const text = (share) => (100 * share).toFixed(1);
  return value === null || value === undefined ? "–" : `${text(value)} %` + (typeof low === "number" && typeof high === "number" ? ` [${text(low)}, ${text(high)}]` : "");
}

function evaluation(holder) {
  let any = false;
  runs.forEach((run, place) => {
    if (runs.length > 1) holder.append(el("h3", {}, names()[place]));
    if (run.evaluation.length) {
      any = true;
      holder.append(el("h4", {}, "Benchmarks"), table(["benchmark", "rule or group", "accuracy, interval", "rows"], run.evaluation.map((row) => [row.benchmark, row.what, percent(row.accuracy, row.low, row.high), row.rows])));
    }
    for (const [stage, own] of Object.entries(run.stages)) {
      for (const prefix of ["eval_before/", "eval/"]) {
        const columns = Object.keys(own.series).filter((name) => name.startsWith(prefix));
        const counts = own.series[prefix + "samples"];
        const rows = own.steps.flatMap((step, at) => (columns.every((name) => own.series[name][at] === null) ? [] : [[prefix === "eval/" ? step : "before", ...columns.map((name) => {
          const value = own.series[name][at];
          const count = counts?.[at];
          return name === prefix + "accuracy" && value !== null ? percent(value, ...(count ? wilson(value, count) : [])) : value;
        })]]));
        if (!rows.length) continue;
        any = true;
        holder.append(el("h4", {}, `${stage}: test set ${prefix === "eval/" ? "while training" : "before training"}`), table(["after step", ...columns.map((name) => name.slice(prefix.length))], rows));
      }
    }
  });
  holder.append(el("p", {}, any ? "Intervals: 95 %, Wilson's, of answers that count 0 or 1." : "Nothing has been evaluated (data.test, training.evaluate_every)."));
}

function configuration(holder) {
  const all = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
  const body = el("div");
  const only = el("input", { type: "checkbox", checked: true, change: () => fill() });
  const search = el("input", { type: "search", placeholder: "part of a key", "aria-label": "keys that hold", "data-filter": true, input: () => fill() });
  const fill = () => {
    const defaults = runs[0].defaults;
    const differs = (key) => runs.some((run) => !same(run.config[key], defaults[key])) || runs.some((run) => !same(run.config[key], runs[0].config[key]));
    const keys = all.filter((key) => key.includes(search.value) && (!only.checked || differs(key)));
    const cells = (key) => runs.map((run) => (same(run.config[key], defaults[key]) ? show(run.config[key]) : el("b", {}, show(run.config[key]))));
    body.replaceChildren(keys.length ? table(["key", ...(runs.length > 1 ? names() : ["value"]), "default"], keys.map((key) => [key, ...cells(key), key in defaults ? show(defaults[key]) : "required"])) : el("p", {}, "No key is like this."));
  };
  holder.append(el("div", { class: "tools" }, search, el("label", {}, only, " only what differs")), el("p", {}, "Defaults are the published 7B settings of MM-EUREKA where it has one; what differs from them is bold."), body);
  fill();
  for (const run of runs) for (const change of run.changes)
    holder.append(el("h4", {}, `${run.name}: ${change.stage} from step ${change.step} on`), table(["key", "first configuration", "then"], change.keys));
  for (const run of runs) if (Object.keys(run.versions).length) holder.append(el("h4", {}, `${run.name}: versions`), table(["what", "version"], Object.entries(run.versions)));
}

const FAULTS = { "timed/engine_restarts": "engines replaced, in all", "rewards/timeouts": "judgements out of time, in all", "filter/skipped": "steps skipped by the filter", "checkpoint/failed": "checkpoints that could not be written" };

function faults(holder) {
  for (const run of runs) {
    if (runs.length > 1) holder.append(el("h3", {}, run.name));
    const counts = Object.entries(FAULTS).flatMap(([name, text]) => Object.keys(run.stages).flatMap((stage) => {
      const values = (seriesOf(run, stage, name) ?? []).map((value) => value ?? 0);
      return values.length ? [[text, text.endsWith("in all") ? Math.max(...values) : values.reduce((sum, value) => sum + value, 0)]] : [];
    }));
    if (counts.length) holder.append(el("h4", {}, "Counted"), table(["what", "how often"], counts));
    const { non_finite: broken, again, pauses } = run.faults;
    holder.append(el("h4", {}, "Restarts"), again.length ? table(["stage", "steps done again"], again.map((one) => [one.stage, `${one.first}–${one.last}`])) : el("p", {}, "No step was done again."));
    if (pauses.length) holder.append(table(["stage", "before step", "stood still"], pauses.map((one) => [one.stage, one.step, seconds(one.seconds)])));
    holder.append(el("h4", {}, "Values that are not finite"), broken.length ? table(["stage", "step", "metric", "value"], broken.slice(0, 500).map((one) => [one.stage, one.step, one.name, one.value])) : el("p", {}, "None."));
    const seats = run.topology?.seats;
    if (Array.isArray(seats)) holder.append(el("h4", {}, `Machines (${show(run.topology.placement)})`), table(["role", "rank", "node", "GPUs"], seats.map((seat) => [seat?.role, seat?.rank, seat?.node, Array.isArray(seat?.gpus) ? seat.gpus.join(", ") || "none" : show(seat?.gpus)])));
  }
}
