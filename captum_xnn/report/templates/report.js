"use strict";
// The page's data, its state, names and sentences. The script of the gallery, or of texts and tables, follows in the same
// script, and defines drawNames, drawOutput and showTarget. Text is always inserted as plain text, never as HTML:
// file names, class names and names of x-features may hold anything.
const data = JSON.parse(document.getElementById("data").textContent);
// The page before anything is drawn into it and without its data, to save it again with names. The data are kept once.
document.getElementById("data").textContent = "";
const shell = `<!DOCTYPE html>\n${document.documentElement.outerHTML}\n`;
const names = Object.create(null);
const state = { target: 0, on: null, scale: "own", shown: null, rather: false };
const ONE = "one";
const el = (id) => document.getElementById(id);

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// --- numbers and names

const target = () => data.targets[state.target];

// The numbers and maps of an example: of the target, or of what it has more than the output to compare with.
function rowOf(index) {
  const row = target().rows[index];
  return state.rather && row.rather ? { ...row, ...row.rather, first: row } : row;
}

const labelShown = () => (state.rather && target().rows[0].rather ? target().rows[0].rather.label : target().label);
const unexplained = (row) => row.prediction - row.sum;

function plain(value, decimals = target().decimals) {
  const text = value.toFixed(decimals);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "\u2212");
}

// The model's output. Log-odds have their probability beside them, which more readers know.
function outputText(row) {
  if (data.unit !== "log-odds") return plain(row.prediction);
  const chance = 1 / (1 + Math.exp(-row.prediction)), decimals = chance < 0.1 || chance > 0.9 ? 1 : 0;
  return `${(100 * chance).toFixed(decimals)} %: ${plain(row.prediction)}`;
}

function signed(value, decimals = target().decimals) {
  const text = plain(value, decimals);
  return value > 0 && Number(value.toFixed(decimals)) !== 0 ? "+" + text : text;
}

// Residuals are small beside the output, so they get one more decimal.
const unexplainedText = (row) => `unexplained ${signed(unexplained(row), target().decimals + 1)}`;

const side = (value) => (value > 0 ? "raises" : value < 0 ? "lowers" : "");
// A fit may merge small groups, so each target has a number of x-features of its own.
const featureList = (of = target()) => of.rows[0].c.map((_, k) => k);
const given = (key, k) => (names[key] && names[key][k]) || "";
const nameOf = (k, key = target().key) => (k === ONE ? "1-Heatmap" : given(key, k) || `x-feature ${k + 1}`);

// The sentence of an image, as captum_xnn.plots._sentence writes it: x-features are named until they hold this share of
// their side's contributions, and the unexplained part if it is above that share of all contributions.
const NAMED = 0.9, NOTABLE = 0.1;

function digitsOf(values) {
  const largest = Math.max(0, ...values.map(Math.abs));
  return largest > 0 ? Math.min(Math.max(2 - Math.floor(Math.log10(largest)), 1), 6) : 1;
}

function enumerate(said) {
  return said.length > 1 ? `${said.slice(0, -1).join(", ")} and ${said[said.length - 1]}` : said[0];
}

// All sentences of an image: why the target, and why the target rather than the output to compare with.
function sentencesOf(shown) {
  const row = shown.first || shown;
  return row.rather ? `${sentenceOf(row)}. ${sentenceOf(row.rather, row.rather.label)}` : sentenceOf(row);
}

function sentenceOf(row, asked) {
  const label = asked ?? target().label;
  const digits = digitsOf(row.c);
  const order = featureList().sort((a, b) => Math.abs(row.c[b]) - Math.abs(row.c[a]) || a - b);
  const sum = (some) => some.reduce((total, k) => total + Math.abs(row.c[k]), 0);
  const pro = order.filter((k) => row.c[k] > 0), against = order.filter((k) => row.c[k] < 0);
  const [first, second, start] = sum(pro) >= sum(against) ? [pro, against, ""] : [against, pro, "against "];
  const unnamed = (1 - NAMED) * Math.max(sum(pro), sum(against));
  const needed = (some) => {
    let left = sum(some), count = 0;
    while (count < some.length && left > unnamed * (1 + 1e-12)) left -= Math.abs(row.c[some[count++]]);
    return count;
  };
  const said = (k) => `${nameOf(k)} (${signed(row.c[k], digits)})`;
  const because = first.slice(0, Math.max(1, needed(first))).map(said), although = second.slice(0, needed(second)).map(said);
  let what = `${start}${label}`;
  // The bias decides here, and not the x-features.
  if (asked === undefined && target().classes && row.is_positive === (start !== ""))
    what = `${start ? "less" : "more"} like ${label} than the average example`;
  let text = because.length ? `${what} because of ${enumerate(because)}` : `no reason for ${label}`;
  if (although.length) text += `, although ${enumerate(although)}`;
  const more = digitsOf([...row.c, unexplained(row)]);
  if (Math.abs(unexplained(row)) > NOTABLE * (sum(pro) + sum(against)) && Number(unexplained(row).toFixed(more)))
    text += `; unexplained: ${signed(unexplained(row), more)}`;
  return text;
}

// How usual the reasons of a positive are for its class.
function usualOf(shown) {
  const { usual } = shown.first || shown;
  if (!usual) return "";
  const percent = `(${Math.max(1, Math.round(100 * usual.share))} %)`;
  if (!usual.unusual) return `usual reasons ${percent}`;
  const size = Math.abs(usual.deviations);
  const by = `${size < 99.95 ? size.toFixed(1) : "over 99"} standard deviations ${usual.deviations > 0 ? "above" : "below"}`;
  return `unusual reasons ${percent}: ${nameOf(usual.feature)} is ${by} its mean`;
}

const shareOf = (row) => (row.usual ? row.usual.share : null);
const USUAL = {
  unusual: (row) => shareOf(row) ?? 2,
  usual: (row) => -(shareOf(row) ?? -2),
};

// --- names

function filled(all) {
  const kept = {};
  for (const key of Object.keys(all)) {
    const given = Object.entries(all[key]).filter(([, name]) => name);
    if (given.length) kept[key] = Object.fromEntries(given);
  }
  return kept;
}

const exported = () => JSON.stringify({ captum_xnn: "names", version: 1, layer: data.layer, names: filled(names) }, null, 1);
const countOf = (all) => Object.values(filled(all)).reduce((sum, each) => sum + Object.keys(each).length, 0);

// Names stay in the browser, under the identity of the explainers, so that the next report on them has them too. Names
// that were written into the page count more, unless they are those that the reader began with.
const PLACE = `captum_xnn names of ${data.id}`, written = JSON.stringify(filled(data.names));
let storing = true, atRisk = false;

function takeNames() {
  for (const key of Object.keys(names)) delete names[key];
  for (const key of Object.keys(data.names)) names[key] = { ...data.names[key] };
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE));
    if (!kept) return;
    for (const key of Object.keys(kept.names)) {
      names[key] = kept.written === written ? kept.names[key] : { ...kept.names[key], ...filled(data.names)[key] };
    }
  } catch {
    storing = false;
  }
}

function keepNames() {
  const changed = JSON.stringify(filled(names)) !== written;
  atRisk = changed;
  try {
    if (changed) localStorage.setItem(PLACE, JSON.stringify({ written, names }));
    else localStorage.removeItem(PLACE);
    storing = true;
  } catch {
    storing = false;
  }
  tellKept();
}

function tellKept() {
  const changed = JSON.stringify(filled(names)) !== written, count = countOf(names);
  el("names-kept").textContent = !changed ? "" : !storing ? "This browser does not keep names: save them before you leave."
    : `${count === 1 ? "1 name is" : `${count} names are`} kept in this browser only. Save the page to pass them on.`;
  el("names-forget").hidden = !changed;
}

// Only where the browser keeps nothing would leaving the page lose names.
addEventListener("beforeunload", (event) => {
  if (atRisk && !storing) event.preventDefault();
});

function download(text, name, type) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  atRisk = false;
}

// This page with the names inside it. Characters that could end the script are written as numbers, as in the first page.
function pageWithNames() {
  const content = JSON.stringify({ ...data, names: filled(names) })
    .replace(/[<>&'\u2028\u2029]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  const place = '<script type="application/json" id="data">';
  return shell.replace(place, () => place + content);
}

function writeNames() {
  for (const node of document.querySelectorAll("[data-name-of]")) {
    const [key, k] = splitKey(node.dataset.nameOf);
    node.textContent = nameOf(k, key);
  }
  for (const input of document.querySelectorAll("[data-name-input]")) {
    const [key, k] = splitKey(input.dataset.nameInput);
    if (input !== document.activeElement) input.value = given(key, k);
  }
  el("names-json").value = exported();
  drawNames();
}

// A target may be a tuple such as "(0, 1)"; the number of the x-feature follows the last colon.
function splitKey(text) {
  const at = text.lastIndexOf(":");
  return [text.slice(0, at), Number(text.slice(at + 1))];
}

for (const input of document.querySelectorAll("[data-name-input]")) {
  input.addEventListener("input", () => {
    const [key, k] = splitKey(input.dataset.nameInput);
    names[key] = { ...names[key], [k]: input.value.trim() };
    keepNames();
    writeNames();
  });
  input.addEventListener("change", writeNames);
}

function tell(text) {
  el("names-status").textContent = text;
}

el("names-download").addEventListener("click", () => {
  download(exported(), "names.json", "application/json");
  tell("Saved as names.json in your browser's download folder.");
});

el("names-page").addEventListener("click", () => {
  const file = decodeURIComponent(location.pathname.split("/").pop() || "report.html");
  const name = `${file.replace(/( with names)?( ?\(\d+\))?\.html?$/i, "")} with names.html`;
  download(pageWithNames(), name, "text/html");
  tell(`Saved as ${name} in your browser's download folder.`);
});

el("names-forget").addEventListener("click", () => {
  try {
    localStorage.removeItem(PLACE);
  } catch {
    // Nothing is kept where storage is blocked.
  }
  atRisk = false;
  takeNames();
  tellKept();
  writeNames();
  tell("The names kept in this browser are forgotten.");
});

el("names-copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(exported());
    tell("Copied.");
  } catch {
    document.querySelector("details").open = true;
    el("names-json").select();
    tell("Your browser blocks the clipboard. The text is selected below; copy it by hand.");
  }
});

// For a model with one output, target None and target 0 are the same.
function keyHere(key) {
  const here = (wanted) => data.targets.some((each) => each.key === wanted), same = { None: "0", 0: "None" }[key];
  return !here(key) && same && here(same) ? same : key;
}

el("names-load").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (!file) return;
  try {
    const found = JSON.parse(await file.text());
    if (!found || found.captum_xnn !== "names" || found.version !== 1) throw new Error("it is not a file of x-feature names in version 1");
    if (found.layer !== data.layer) throw new Error(`its names are of layer ${found.layer}, but this page explains layer ${data.layer}`);
    for (const [written, each] of Object.entries(found.names)) {
      const here = data.targets.find((one) => one.key === keyHere(written)), count = here && featureList(here).length;
      const beyond = Object.keys(each).find((k) => here && Number(k) >= count);
      if (beyond !== undefined) throw new Error(`it names x-feature ${Number(beyond) + 1}, but ${here.label} has ${count} x-features`);
    }
    let count = 0;
    for (const [written, each] of Object.entries(found.names)) {
      const key = keyHere(written);
      names[key] = { ...names[key] };
      for (const [k, name] of Object.entries(each)) {
        names[key][k] = String(name);
        count += 1;
      }
    }
    keepNames();
    writeNames();
    tell(count === 1 ? "1 name loaded." : `${count} names loaded.`);
  } catch (error) {
    tell(`${file.name} was not loaded: ${error.message}.`);
  }
  event.target.value = "";
});

// --- the page as a whole

// The choices of order and filter, for the target shown.
function offerOrders() {
  const sort = el("sort"), was = sort.value || "given", known = target().rows.some((row) => row.usual);
  const usual = known ? [["unusual", "unusual reasons"], ["usual", "usual reasons"]] : [];
  const options = [["given", "original order"], ["prediction", "the model's output"], ["unexplained", "unexplained"], ...usual, ...featureList().map((k) => [String(k), ""])];
  sort.replaceChildren(...options.map(([value, text]) => {
    const option = make("option", "", text);
    option.value = value;
    return option;
  }));
  sort.value = options.some(([value]) => value === was) ? was : "given";
  // Without classes there is nothing to filter by.
  el("filter-label").hidden = !target().classes;
  if (!target().classes) el("filter").value = "all";
}

// The choice between the target and its difference from the output to compare with.
function offerOutputs() {
  const rather = target().rows[0].rather;
  el("output-label").hidden = !rather;
  state.rather &&= Boolean(rather);
  if (!rather) return;
  el("output").replaceChildren(...[["own", target().label], ["rather", rather.label]].map(([value, text]) => {
    const option = make("option", "", text);
    option.value = value;
    return option;
  }));
  el("output").value = state.rather ? "rather" : "own";
}
el("output").addEventListener("change", () => {
  state.rather = el("output").value === "rather";
  drawOutput();
});

function showChapter(index) {
  state.target = index;
  offerOutputs();
  for (const node of document.querySelectorAll("[data-chapter]")) node.hidden = node.dataset.chapter !== String(index);
  // The anchors point into the chapter on show.
  for (const [id, nth] of [["faithfulness", 0], ["cards", 1]]) {
    const old = el(id);
    if (old) old.removeAttribute("id");
    document.querySelectorAll(`[data-chapter="${index}"] h2`)[nth].id = id;
  }
}

if (el("target")) el("target").addEventListener("change", (event) => showTarget(Number(event.target.value)));
for (const button of document.querySelectorAll("[data-set-theme]")) {
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = button.dataset.setTheme;
    for (const other of document.querySelectorAll("[data-set-theme]")) other.setAttribute("aria-pressed", String(other === button));
  });
}

takeNames();
tellKept();
