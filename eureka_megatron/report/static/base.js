"use strict";
// Elements, data, the address. All text from a run goes through `el`, that is into text nodes and plain attributes.

const nonce = document.currentScript.nonce;
const $ = (selector, root = document) => root.querySelector(selector);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

async function unpackText(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

// What was looked at last stays unpacked.
const kept = new Map();
async function unpack(id, most = 12) {
  if (!document.getElementById(id)) return null;
  const found = kept.get(id) ?? unpackText(id).then(JSON.parse);
  kept.delete(id);
  kept.set(id, found);
  if (kept.size > most) kept.delete(kept.keys().next().value);
  return found;
}

let runs = [];
const names = () => (runs.length > 1 && runs[0].name === runs[1].name ? ["A: " + runs[0].name, "B: " + runs[1].name] : runs.map((run) => run.name));
const stagesOf = () => [...new Set(["train", ...runs.flatMap((run) => Object.keys(run.stages))])].filter((stage) => runs.some((run) => run.stages[stage]));
const seriesOf = (run, stage, name) => run.stages[stage]?.series[name];

function show(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return typeof value === "object" ? JSON.stringify(value) : String(value);
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6 ? String(Number(value.toPrecision(digits))) : value.toExponential(1).replace(".0e", "e");
}

function seconds(value) {
  if (value < 120) return `${show(value, 3)} s`;
  return value < 7200 ? `${Math.round(value / 60)} min` : `${show(value / 3600, 3)} h`;
}

// #section/key=value&key=value
function address() {
  const text = location.hash.slice(1);
  const end = text.indexOf("/");
  return { section: end < 0 ? text : text.slice(0, end), values: Object.fromEntries(new URLSearchParams(end < 0 ? "" : text.slice(end + 1))) };
}

// Of the section that is open: what is still loading must not call a section back that the reader has left meanwhile.
function setAddress(section, values = {}) {
  const open = address().section;
  if (open && open !== section) return;
  const given = Object.entries(values).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const text = new URLSearchParams(given).toString();
  history.replaceState(null, "", "#" + section + (text ? "/" + text : ""));
}

// A cell is a value or an element.
function table(columns, rows) {
  const cell = (tag) => (value) => el(tag, typeof value === "number" ? { class: "number" } : {}, value instanceof Node ? value : show(value));
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": columns.join(", ") },
    el("table", {}, el("thead", {}, el("tr", {}, columns.map(cell("th")))), el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell("td")))))));
}

function choice(label, options, value, changed) {
  const select = el("select", { "aria-label": label, change: () => changed(select.value) },
    options.map(([key, text]) => el("option", { value: key, selected: String(key) === String(value) }, text)));
  return el("label", {}, label + " ", select);
}

function field(label, value, changed, attributes = {}) {
  const input = el("input", { type: "number", step: "any", value: value ?? "", "aria-label": label, change: () => changed(input.value), ...attributes });
  return el("label", {}, label + " ", input);
}
