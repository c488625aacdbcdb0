// The browser of stored rollouts: a list of responses by index, beside it the chosen one's whole group.

const PER_PAGE = 100;
const LOGPROB_UNIT = 0.01, DIFFERENCE_UNIT = 1e-4; // as in samples.py
const plainState = { run: 0, step: "", accuracy: "", least: "", most: "", shortest: "", longest: "", sort: "step", colour: "none", group: "", response: "" };
const browser = { ...plainState, index: null, found: [], at: 0 };

const sorts = {
  step: ["step", (index, one, other) => one - other],
  worst: ["lowest reward", (index, one, other) => (index.total[one] ?? 0) - (index.total[other] ?? 0) || one - other],
  best: ["highest reward", (index, one, other) => (index.total[other] ?? 0) - (index.total[one] ?? 0) || one - other],
  longest: ["longest", (index, one, other) => index.length[other] - index.length[one] || one - other],
  shortest: ["shortest", (index, one, other) => index.length[one] - index.length[other] || one - other],
  advantage: ["largest advantage", (index, one, other) => Math.abs(index.advantage[other] ?? 0) - Math.abs(index.advantage[one] ?? 0) || one - other],
};
const colours = { none: "nothing", advantage: "advantage", logprob: "log-probability (engine)", difference: "trainer − engine", entropy: "entropy" };

async function rollouts(holder) {
  const list = el("div", { class: "list", id: "list", role: "listbox", tabindex: 0, "aria-label": "responses" });
  const detail = el("div", { class: "detail", id: "detail", "aria-live": "polite" });
  const tools = el("div", { class: "tools", id: "filters" });
  holder.append(tools, el("div", { class: "browser" }, list, detail));
  browser.parts = { list, detail, tools };
}

// values: what is filtered by, and which response to choose: group, response and, where no step is filtered by, `at` its step.
async function showRollouts({ at = "", ...values }) {
  const wanted = { ...plainState, ...values };
  const same = browser.index && String(wanted.run) === String(browser.run);
  Object.assign(browser, wanted, { run: Number(wanted.run) || 0 });
  if (!same) browser.index = await unpack("index-" + browser.run, 99);
  browser.steps = [...new Set(browser.index.step)];
  search({ step: at === "" ? browser.step : at, group: browser.group, response: browser.response });
}

// Which responses the filter leaves, in order. wanted: the one to choose among them.
function search(wanted = null) {
  const { index } = browser;
  const number = (text) => (text === "" || text === undefined ? null : Number(text));
  const [step, least, most, shortest, longest] = ["step", "least", "most", "shortest", "longest"].map((name) => number(browser[name]));
  browser.found = [];
  for (let at = 0; at < index.step.length; at++) {
    if (step !== null && index.step[at] !== step) continue;
    if (least !== null && !(index.total[at] >= least)) continue;
    if (most !== null && !(index.total[at] <= most)) continue;
    if (shortest !== null && index.length[at] < shortest) continue;
    if (longest !== null && index.length[at] > longest) continue;
    if (browser.accuracy === "right" && !(index.accuracy[at] > 0.5)) continue;
    if (browser.accuracy === "wrong" && index.accuracy[at] > 0.5) continue;
    browser.found.push(at);
  }
  const order = (sorts[browser.sort] ?? sorts.step)[1];
  if (browser.sort !== "step") browser.found.sort((one, other) => order(index, one, other));
  const isWanted = (at) => ["step", "group", "response"].every((name) => wanted[name] === "" || index[name][at] === Number(wanted[name]));
  const place = wanted ? browser.found.findIndex(isWanted) : 0;
  fillTools();
  choose(Math.max(place, 0));
}

function fillTools() {
  const set = (name) => (value) => { browser[name] = value; browser.group = browser.response = ""; search(); };
  const { tools } = browser.parts;
  const focused = document.activeElement?.getAttribute("aria-label");
  tools.replaceChildren(
    ...(runs.length > 1 ? [choice("run", names().map((name, place) => [place, name]), browser.run, (run) => showRollouts({ ...given(), run, step: "", group: "", response: "" }))] : []),
    choice("step", [["", `all ${browser.steps.length} stored`], ...browser.steps.map((step) => [step, step])], browser.step, set("step")),
    choice("accuracy", [["", "any"], ["right", "right"], ["wrong", "wrong"]], browser.accuracy, set("accuracy")),
    field("reward from", browser.least, set("least"), { "data-filter": true }), field("to", browser.most, set("most")),
    field("tokens from", browser.shortest, set("shortest")), field("to ", browser.longest, set("longest")),
    choice("sort by", Object.entries(sorts).map(([key, [text]]) => [key, text]), browser.sort, set("sort")),
    choice("colour tokens by", Object.entries(colours), browser.colour, recolour),
    el("button", { click: () => { Object.assign(browser, plainState, { run: browser.run, colour: browser.colour }); search(); } }, "reset"));
  if (focused) [...tools.querySelectorAll("[aria-label]")].find((node) => node.getAttribute("aria-label") === focused)?.focus();
}

function given() {
  return Object.fromEntries(Object.keys(plainState).filter((name) => String(browser[name]) !== String(plainState[name])).map((name) => [name, browser[name]]));
}

function recolour(name) {
  browser.colour = name;
  choose(browser.at);
}

function choose(place) {
  const { list, detail } = browser.parts;
  const { index, found } = browser;
  browser.at = Math.min(Math.max(place, 0), Math.max(found.length - 1, 0));
  if (!found.length) {
    list.replaceChildren(el("p", {}, index.step.length ? "No response is like this." : "No rollouts are stored (tracking.rollouts_every)."));
    detail.replaceChildren();
    browser.group = browser.response = "";
    return setAddress("rollouts", given());
  }
  const first = Math.floor(browser.at / PER_PAGE) * PER_PAGE;
  const rows = found.slice(first, first + PER_PAGE).map((at, offset) => {
    const own = first + offset === browser.at;
    return el("div", { class: "row", role: "option", id: own ? "chosen" : null, "aria-selected": own ? "true" : "false", click: () => choose(first + offset) },
      el("span", {}, `${index.step[at]} · ${index.group[at]} · ${index.response[at]}`), el("span", { class: index.accuracy[at] > 0.5 ? "right" : "wrong" }, index.accuracy[at] > 0.5 ? "✓" : "✗"),
      el("span", {}, show(index.total[at], 3)), el("span", {}, show(index.advantage[at], 2)), el("span", {}, show(index.length[at])));
  });
  const pages = el("div", { class: "pages" }, el("button", { click: () => choose(first - PER_PAGE), disabled: first === 0, "aria-label": "earlier responses" }, "‹"),
    `${first + 1}–${first + rows.length} of ${found.length}`, el("button", { click: () => choose(first + PER_PAGE), disabled: first + PER_PAGE >= found.length, "aria-label": "later responses" }, "›"));
  const head = el("div", { class: "row head", role: "presentation" }, ...["step · group · response", "", "reward", "adv.", "tokens"].map((text) => el("span", {}, text)));
  list.replaceChildren(pages, head, ...rows);
  list.setAttribute("aria-activedescendant", "chosen");
  const chosen = $("#chosen", list);
  if (chosen.offsetTop < list.scrollTop + 60 || chosen.offsetTop + chosen.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = chosen.offsetTop - list.clientHeight / 2;
  const at = found[browser.at];
  showGroup(index.step[at], index.group[at], index.response[at]);
}

async function showGroup(step, number, response) {
  Object.assign(browser, { group: number, response });
  setAddress("rollouts", { ...given(), at: browser.step === "" ? step : "" });
  const { detail } = browser.parts;
  const data = await unpack(`step-${browser.run}-${step}`);
  if (browser.group !== number || browser.response !== response) return; // another was chosen meanwhile
  const group = data.groups[number];
  const responses = Object.entries(group.responses);
  const right = responses.filter(([, one]) => one.rewards.accuracy > 0.5).length;
  const before = detail.dataset.shown;
  detail.dataset.shown = `${browser.run} ${step} ${number}`;
  detail.replaceChildren(
    el("h3", {}, `step ${step} · group ${number} · ${group.prompt_id}`),
    el("p", {}, "answer ", el("b", {}, group.answer), ` · ${right} of ${responses.length} right`),
    legendOf(group) ?? "",
    el("div", { class: "beside" }, el("div", { class: "prompt" }, pictures(group), prompt(group)),
      el("div", { class: "cards" }, responses.map(([own, one]) => card(own, one, Number(own) === response, group)))));
  const chosen = $(".card.chosen", detail);
  if (before === detail.dataset.shown && innerWidth > 700) chosen?.scrollIntoView({ block: "nearest" });
}

function pictures(group) {
  return group.pictures.map((key, place) => {
    const url = document.getElementById("picture-" + key)?.textContent;
    return url ? el("img", { src: url, alt: `picture ${place + 1} of the prompt`, title: "enlarge", click: (event) => event.target.classList.toggle("large") }) : el("p", {}, `picture ${place + 1} is not stored`);
  });
}

// Control tokens faint; a picture's placeholder as what it stands for.
function prompt(group) {
  let picture = 0;
  const parts = group.prompt.split(/(<\|[a-z_]+\|>)/).map((part, place) => {
    if (place % 2 === 0) return part;
    if (part !== "<|image_pad|>" && part !== "<|video_pad|>") return [el("wbr"), el("span", { class: "control" }, part), el("wbr")];
    return el("span", { class: "chip" }, `picture ${picture + 1}: ${group.picture_tokens[picture++] ?? "?"} tokens`);
  });
  const images = group.picture_tokens.reduce((sum, count) => sum + count, 0);
  return [el("pre", { class: "text" }, parts.flat()), el("small", {}, `${group.prompt_tokens} tokens, ${images} of pictures`)];
}

function card(number, one, chosen, group) {
  const parts = Object.entries(one.rewards).map(([name, value]) => el("span", { class: "chip" }, `${name} ${show(value, 3)}`));
  const right = one.rewards.accuracy > 0.5;
  const scale = scaleOf(group);
  const tokens = one.pieces.map((piece, place) => {
    const value = valueOf(one, place);
    const told = [`token ${place}`];
    for (const name of ["logprob", "difference", "entropy"]) if (known(valueOf(one, place, name))) told.push(`${colours[name]} ${show(valueOf(one, place, name))}`);
    return el("span", { title: told.join(", "), style: known(value) ? `background:${tint(value, scale)}` : null }, piece);
  });
  return el("article", { class: "card" + (chosen ? " chosen" : ""), "aria-label": `response ${number}` },
    el("header", {}, el("b", { class: right ? "right" : "wrong" }, `${right ? "✓" : "✗"} response ${number}`), ` advantage ${show(one.advantage, 3)} · ${one.pieces.length} tokens`,
      one.finish_reason === "stop" ? null : ` · ended by ${one.finish_reason}`, ` · weights ${one.weight_version}`),
    el("p", { class: "chips" }, parts), el("pre", { class: "text" }, tokens));
}

const known = (value) => value !== null && value !== undefined;

function valueOf(one, place, name = browser.colour) {
  if (name === "advantage") return one.advantage;
  const [values, unit] = { logprob: [one.logprobs, LOGPROB_UNIT], difference: [one.difference, DIFFERENCE_UNIT], entropy: [one.entropy, LOGPROB_UNIT] }[name] ?? [null, 1];
  return known(values?.[place]) ? values[place] * unit : null;
}

// Largest amount in the group: colours of its responses can be compared.
function scaleOf(group) {
  let largest = 0;
  for (const one of Object.values(group.responses)) for (let place = 0; place < one.pieces.length; place++) largest = Math.max(largest, Math.abs(valueOf(one, place) ?? 0));
  return largest;
}

// Blue above zero, orange below, by amount.
function tint(value, scale) {
  const strength = scale ? Math.round((Math.abs(value) / scale) * 60) : 0;
  return `color-mix(in srgb, var(--series-${value >= 0 ? 0 : 1}) ${strength}%, transparent)`;
}

function legendOf(group) {
  if (browser.colour === "none") return null;
  const scale = scaleOf(group);
  if (["difference", "entropy"].includes(browser.colour) && Object.values(group.responses).every((one) => !one[browser.colour])) return el("p", { class: "legend" }, `${colours[browser.colour]}: not stored for this step`);
  const low = browser.colour === "entropy" ? null : el("span", { style: `background:${tint(-1, 1)}` }, ` −${show(scale, 3)} `);
  return el("p", { class: "legend" }, `${colours[browser.colour]}: `, low, " 0 ", browser.colour === "logprob" ? null : el("span", { style: `background:${tint(1, 1)}` }, ` ${show(scale, 3)} `));
}

function otherGroup(by) {
  const { index, found, at } = browser;
  const same = (one, other) => index.step[one] === index.step[other] && index.group[one] === index.group[other];
  let place = at;
  while (place >= 0 && place < found.length && same(found[place], found[at])) place += by;
  if (place >= 0 && place < found.length) choose(place);
}

function rolloutKey(key) {
  if (key === "j" || key === "ArrowDown") choose(browser.at + 1);
  else if (key === "k" || key === "ArrowUp") choose(browser.at - 1);
  else if (key === "l" || key === "ArrowRight") otherGroup(1);
  else if (key === "h" || key === "ArrowLeft") otherGroup(-1);
  else if (key === "c") {
    const order = Object.keys(colours);
    recolour(order[(order.indexOf(browser.colour) + 1) % order.length]);
    fillTools();
  } else return false;
  return true;
}
