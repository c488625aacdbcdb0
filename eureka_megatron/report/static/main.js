// Sections, keys, and the beginning.

const sections = {
  overview: ["Overview", overview], curves: ["Curves", curves], phases: ["Phases", phases], filter: ["Filter", filter], rollouts: ["Rollouts", rollouts],
  evaluation: ["Evaluation", evaluation], configuration: ["Configuration", configuration], faults: ["Faults, machines", faults],
};
const keys = [
  ["1 … 8", "a section"], ["j, k or ↓, ↑", "next, previous response (Rollouts)"], ["l, h or →, ←", "next, previous group (Rollouts); steps along (charts)"], ["c", "colour tokens by another value (Rollouts)"],
  ["+, −, 0", "zoom: closer, wider, all steps (charts)"], ["/", "to the filter"], ["Esc", "out of a field, close this"], ["?", "this list"],
];
const built = new Map();
let current = "overview";

async function build(name) {
  if (!built.has(name)) {
    const holder = el("section", { id: "section-" + name, "aria-label": sections[name][0] }, el("h2", {}, sections[name][0]));
    const places = Object.keys(sections);
    const next = [...built].filter(([other]) => places.indexOf(other) > places.indexOf(name)).sort(([one], [other]) => places.indexOf(one) - places.indexOf(other))[0];
    $("#main").insertBefore(holder, next?.[1] ?? null);
    built.set(name, holder);
    await sections[name][1](holder);
  }
  return built.get(name);
}

async function open() {
  const { section, values } = address();
  current = section in sections ? section : "overview";
  for (const link of document.querySelectorAll("#sections a")) {
    const own = link.getAttribute("href") === "#" + current;
    own ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
    if (own) link.parentElement.scrollLeft = link.offsetLeft - 100;
  }
  for (const [name, holder] of built) holder.classList.toggle("other", name !== current);
  (await build(current)).classList.remove("other");
  if (current === "rollouts") await showRollouts(values);
  else if (values.from !== undefined) setRange([Number(values.from), Number(values.to)]);
}

const stepped = () => ["curves", "phases", "filter"].includes(current);
rangeListeners.push(() => { if (stepped()) setAddress(current, range ? { from: range[0], to: range[1] } : {}); });

function chartKey(key) {
  if (key === "+" || key === "=") moveRange(0.5, 0);
  else if (key === "-") moveRange(2, 0);
  else if (key === "0") setRange(null);
  else if (key === "ArrowRight" || key === "l") moveRange(1, 0.25);
  else if (key === "ArrowLeft" || key === "h") moveRange(1, -0.25);
  else return false;
  return true;
}

addEventListener("keydown", (event) => {
  const inField = event.target.matches?.("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && inField) return event.target.blur();
  if (inField || $("#help").open) return;
  let done = true;
  if (event.key === "?") $("#help").showModal();
  else if (event.key === "/") { const fields = $("[data-filter]", built.get(current)); fields?.focus(); done = Boolean(fields); }
  else if (event.key >= "1" && event.key <= "8") location.hash = Object.keys(sections)[event.key - 1];
  else if (current === "rollouts") done = rolloutKey(event.key);
  else if (stepped()) done = chartKey(event.key);
  else done = false;
  if (done) event.preventDefault();
});

async function begin() {
  runs = await unpack("runs", 99);
  const title = names().join(" and ");
  document.title = `${title} · eureka report`;
  $("#title").textContent = title;
  $("#sections").append(...Object.entries(sections).map(([name, [text]], place) => el("a", { href: "#" + name, title: `key ${place + 1}` }, text)),
    el("button", { click: () => $("#help").showModal(), "aria-label": "keys" }, "?"));
  $("#help").append(el("h2", {}, "Keys"), table(["key", "what it does"], keys), el("form", { method: "dialog" }, el("button", {}, "close")));
  addEventListener("hashchange", open);
  await open();
  document.documentElement.dataset.ready = Math.round(performance.now());
}
begin();
