"use strict";
// The page's data, its state, and the functions that draw them. Text is always inserted as plain text, never as HTML:
// file names, class names and names of x-features may hold anything.
const data = JSON.parse(document.getElementById("data").textContent);
// The page before anything is drawn into it and without its data, to save it again with names. The data are kept once.
document.getElementById("data").textContent = "";
const shell = `<!DOCTYPE html>\n${document.documentElement.outerHTML}\n`;
const names = Object.create(null);
const state = { target: 0, on: null, scale: "own", shown: null };
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
const residual = (row) => row.says - row.sum;

function plain(value, decimals = target().decimals) {
  const text = value.toFixed(decimals);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "\u2212");
}

function signed(value, decimals = target().decimals) {
  const text = plain(value, decimals);
  return value > 0 && Number(value.toFixed(decimals)) !== 0 ? "+" + text : text;
}

// Residuals are small beside the output, so they get one more decimal.
const unexplained = (row) => `unexplained ${signed(residual(row), target().decimals + 1)}`;

const side = (value) => (value > 0 ? "raises" : value < 0 ? "lowers" : "");
const featureList = () => Array.from({ length: data.features }, (_, k) => k);
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

function sentenceOf(row) {
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
  let text = because.length ? `${start}${target().label} because of ${enumerate(because)}` : `no reason for ${target().label}`;
  if (although.length) text += `, although ${enumerate(although)}`;
  const more = digitsOf([...row.c, residual(row)]);
  if (Math.abs(residual(row)) > NOTABLE * (sum(pro) + sum(against)) && Number(residual(row).toFixed(more)))
    text += `; unexplained: ${signed(residual(row), more)}`;
  return text;
}

// --- one image with a map on it

function frame(index, k, shared) {
  const image = data.images[index], row = target().rows[index];
  const node = make("span", "frame");
  node.classList.toggle("pixels", Math.max(image.width, image.height) <= 64);
  node.style.aspectRatio = `${image.width} / ${image.height}`;
  const photo = make("img", "photo");
  photo.alt = "";
  photo.src = image.src;
  node.append(photo);
  if (k !== null) {
    const over = make("img", "over");
    over.alt = k === ONE ? "1-Heatmap" : `map of ${nameOf(k)}`;
    cover(node, over, row, k, shared);
    node.append(over);
  }
  return node;
}

function cover(node, over, row, k, shared) {
  node.classList.add("mapped");
  over.src = k === ONE ? row.one : row.maps[k];
  // The opacity of a pixel grows with its value to the power 0.65, so this factor scales the values of the map.
  over.style.opacity = shared && k !== ONE ? Math.pow(row.strength[k], 0.65) : 1;
}

// --- gallery

const list = el("items");
const items = data.images.map((image, index) => {
  const node = make("li", "item"), pick = make("button", "pick");
  pick.type = "button";
  pick.tabIndex = index ? -1 : 0;
  pick.setAttribute("aria-pressed", "false");
  const number = make("span", "number"), box = make("span", "frame");
  box.classList.toggle("pixels", Math.max(image.width, image.height) <= 64);
  box.style.aspectRatio = `${image.width} / ${image.height}`;
  const photo = make("img", "photo"), over = make("img", "over");
  photo.alt = over.alt = "";
  photo.decoding = "async";
  over.hidden = true;
  box.append(photo, over);
  pick.append(number, box);
  const bars = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  bars.setAttribute("class", "bars");
  bars.setAttribute("aria-hidden", "true");
  bars.setAttribute("preserveAspectRatio", "none");
  const paths = ["axis", "raises", "lowers"].map((name) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", name);
    return path;
  });
  bars.append(...paths);
  const numbers = make("p", "numbers"), why = make("p", "why");
  const caption = make("p", "caption", image.caption);
  caption.title = image.caption;
  node.append(pick, bars, caption, why, numbers);
  const item = { index, node, pick, number, box, photo, over, bars, paths, why, numbers, live: false, selected: false, peeked: false };
  pick.addEventListener("click", () => select(item, !item.selected));
  pick.addEventListener("focus", () => { rove(item); peek(item); });
  pick.addEventListener("blur", () => unpeek(item));
  node.addEventListener("pointerenter", (event) => { if (event.pointerType !== "touch") peek(item); });
  node.addEventListener("pointerleave", () => { if (document.activeElement !== pick) unpeek(item); });
  return item;
});
const itemOf = new Map(items.map((item) => [item.node, item]));
let order = items;

function enliven(item) {
  if (item.live) return;
  item.live = true;
  item.photo.src = data.images[item.index].src;
}

// Pictures are decoded only when they come near the visible part of the page.
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const item = itemOf.get(entry.target);
    if (entry.isIntersecting) enliven(item);
    item.near = entry.isIntersecting;
    if (item.near) drawMap(item);
  }
}, { rootMargin: "300px" });

const strongest = (row) => row.c.reduce((best, value, k) => (Math.abs(value) > Math.abs(row.c[best]) ? k : best), 0);
const mapShown = (item) => (state.on !== null ? state.on : item.peeked ? strongest(target().rows[item.index]) : null);

function drawMap(item) {
  const k = mapShown(item), row = target().rows[item.index];
  const want = k === null ? "" : `${state.target}:${k}:${state.scale}`;
  if (item.drawn === want) return;
  item.drawn = want;
  item.over.hidden = k === null;
  item.box.classList.remove("mapped");
  if (k !== null) cover(item.box, item.over, row, k, state.scale === "shared");
}

function writeNumber(item) {
  const k = mapShown(item), row = target().rows[item.index];
  const value = k === null || k === ONE ? null : row.c[k];
  item.number.className = "number " + (value === null ? "" : side(value));
  item.number.textContent = value !== null ? signed(value) : k === ONE ? "1-Heatmap" : "";
  if (item.selected) item.number.textContent = `\u2713 ${item.number.textContent || "selected"}`;
}

function writeItem(item, largest) {
  const row = target().rows[item.index], K = data.features;
  item.bars.setAttribute("viewBox", `0 -10 ${K * 10} 20`);
  const rects = { raises: "", lowers: "" };
  row.c.forEach((value, k) => {
    const height = (10 * Math.abs(value)) / largest;
    rects[value > 0 ? "raises" : "lowers"] += `M${k * 10 + 1.5} 0h7v${(value > 0 ? -height : height).toFixed(2)}h-7z`;
  });
  item.paths[0].setAttribute("d", `M0 0H${K * 10}`);
  item.paths[1].setAttribute("d", rects.raises);
  item.paths[2].setAttribute("d", rects.lowers);
  const says = data.images[item.index].says;
  item.numbers.textContent = `${says ? says + ", " : ""}${plain(row.says)}; ${unexplained(row)}`;
  item.why.textContent = sentenceOf(row);
  const top = strongest(row);
  item.pick.setAttribute("aria-label",
    `${data.images[item.index].caption}: output ${plain(row.says)}, strongest ${nameOf(top)} ${signed(row.c[top])}, ${unexplained(row)}`);
  writeNumber(item);
}

function writeItems() {
  const largest = Math.max(1e-9, ...target().rows.map((row) => Math.max(...row.c.map(Math.abs))));
  for (const item of items) {
    writeItem(item, largest);
    if (item.near) drawMap(item);
  }
}

function toggle(k) {
  state.on = state.on === k ? null : k;
  for (const button of el("toggles").children) button.setAttribute("aria-pressed", String(button.dataset.map === String(state.on)));
  for (const item of items) {
    writeNumber(item);
    if (item.near) drawMap(item);
  }
}

const SORTS = {
  given: () => 0,
  residual: (item) => -Math.abs(residual(target().rows[item.index])),
  says: (item) => -target().rows[item.index].says,
};

function arrange() {
  const by = el("sort").value, keep = el("filter").value;
  const key = SORTS[by] || ((item) => -target().rows[item.index].c[Number(by)]);
  const keys = new Map(items.map((item) => [item, key(item)]));
  order = items
    .filter((item) => keep === "all" || target().rows[item.index].own === (keep === "own"))
    .sort((a, b) => keys.get(a) - keys.get(b) || a.index - b.index);
  list.replaceChildren(...order.map((item) => item.node));
  if (!order.some((item) => item.pick.tabIndex === 0) && order.length) rove(order[0]);
}

function rove(item) {
  for (const other of items) other.pick.tabIndex = other === item ? 0 : -1;
}

list.addEventListener("keydown", (event) => {
  const at = order.findIndex((item) => item.pick === document.activeElement);
  if (at < 0) return;
  const columns = getComputedStyle(list).gridTemplateColumns.split(" ").length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -at, End: order.length - 1 - at }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  const next = order[at + step];
  if (next) next.pick.focus();
});

// --- the heatmaps of one image

function peek(item) {
  if (state.shown && state.shown !== item) {
    state.shown.peeked = false;
    redraw(state.shown);
  }
  state.shown = item;
  item.peeked = true;
  redraw(item);
  writePeek(item);
  el("peek").classList.add("open");
}

function unpeek(item) {
  item.peeked = false;
  redraw(item);
}

function redraw(item) {
  writeNumber(item);
  drawMap(item);
}

function writePeek(item) {
  const row = target().rows[item.index], image = data.images[item.index];
  el("peek-title").textContent = image.caption;
  el("peek-why").textContent = sentenceOf(row);
  const total = row.c.reduce((sum, value) => sum + value, 0);
  el("peek-sum").textContent =
    `bias ${plain(row.bias)}, x-features ${signed(total)}, sum ${plain(row.sum)}; the model's output ${plain(row.says)}, ${unexplained(row)}`;
  const ranked = featureList().sort((a, b) => row.c[b] - row.c[a]);
  el("peek-maps").replaceChildren(...[...ranked, ONE].map((k) => {
    const node = make("li");
    node.append(frame(item.index, k, state.scale === "shared"));
    node.append(make("b", k === ONE ? "" : side(row.c[k]), k === ONE ? plain(row.says) : signed(row.c[k])), make("span", "", nameOf(k)));
    return node;
  }));
}

// On a narrow screen the heatmaps of an image cover the page, so the reader can close them.
function closePeek() {
  el("peek").classList.remove("open");
  if (state.shown) unpeek(state.shown);
}
el("peek-close").addEventListener("click", closePeek);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !el("comparison").open) closePeek();
});

// --- selection and comparison

const selected = () => order.filter((item) => item.selected).concat(items.filter((item) => item.selected && !order.includes(item)));

function select(item, chosen) {
  item.selected = chosen;
  item.pick.setAttribute("aria-pressed", String(chosen));
  writeNumber(item);
  const count = selected().length;
  el("compare").disabled = el("clear").disabled = !count;
  el("compare").textContent = count ? `Compare ${count}` : "Compare";
}

el("clear").addEventListener("click", () => {
  for (const item of items) if (item.selected) select(item, false);
});

const dropped = new Set();

function writeComparison() {
  const columns = [ONE, ...featureList()];
  el("comparison-title").textContent = `Comparison of ${selected().length}: ${target().label}`;
  el("comparison-toggles").replaceChildren(...columns.map((k) => {
    const button = make("button", "", nameOf(k));
    button.type = "button";
    button.dataset.map = k;
    button.setAttribute("aria-pressed", String(!dropped.has(k)));
    button.addEventListener("click", () => {
      if (!dropped.delete(k)) dropped.add(k);
      writeComparison();
      el("comparison-toggles").querySelector(`[data-map="${k}"]`).focus();
    });
    return button;
  }));
  const shown = columns.filter((k) => !dropped.has(k));
  const head = make("thead"), body = make("tbody"), titles = make("tr");
  titles.append(make("th", "", "image"), ...shown.map((k) => make("th", "", nameOf(k))));
  for (const cell of titles.children) cell.scope = "col";
  head.append(titles);
  for (const item of selected()) {
    const row = target().rows[item.index], line = make("tr"), name = make("th");
    name.scope = "row";
    name.append(make("b", "", plain(row.says)), frame(item.index, null, false), make("span", "", data.images[item.index].caption));
    line.append(name, ...shown.map((k) => {
      const cell = make("td");
      cell.append(make("b", k === ONE ? "" : side(row.c[k]), k === ONE ? plain(row.says) : signed(row.c[k])), frame(item.index, k, state.scale === "shared"));
      return cell;
    }));
    body.append(line);
  }
  el("comparison-table").replaceChildren(head, body);
  el("comparison-table").style.minWidth = `${6.4 * (shown.length + 1)}rem`;
  el("comparison-table").style.maxWidth = `${14 * (shown.length + 1)}rem`;
}

el("compare").addEventListener("click", () => {
  writeComparison();
  el("comparison").showModal();
});
el("comparison-close").addEventListener("click", () => el("comparison").close());

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
  for (const button of el("toggles").children) if (button.dataset.map !== ONE) button.textContent = nameOf(Number(button.dataset.map));
  for (const option of el("sort").options) if (!(option.value in SORTS)) option.textContent = `contribution of ${nameOf(Number(option.value))}`;
  writeItems();
  if (state.shown) writePeek(state.shown);
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
    const beyond = Object.entries(found.names)
      .filter(([written]) => data.targets.some((each) => each.key === keyHere(written)))
      .flatMap(([, each]) => Object.keys(each))
      .find((k) => Number(k) >= data.features);
    if (beyond !== undefined) throw new Error(`it names x-feature ${Number(beyond) + 1}, but this page has ${data.features} x-features`);
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

function showTarget(index) {
  state.target = index;
  for (const node of document.querySelectorAll("[data-chapter]")) node.hidden = node.dataset.chapter !== String(index);
  const sort = el("sort"), was = sort.value || "given";
  const options = [["given", "original order"], ["says", "the model's output"], ["residual", "unexplained"], ...featureList().map((k) => [String(k), ""])];
  sort.replaceChildren(...options.map(([value, text]) => {
    const option = make("option", "", text);
    option.value = value;
    return option;
  }));
  sort.value = was;
  // Without classes there is nothing to filter by.
  el("filter-label").hidden = !target().classes;
  if (!target().classes) el("filter").value = "all";
  // The anchors point into the chapter on show.
  for (const [id, nth] of [["faithfulness", 0], ["cards", 1]]) {
    const old = el(id);
    if (old) old.removeAttribute("id");
    document.querySelectorAll(`[data-chapter="${index}"] h2`)[nth].id = id;
  }
  writeNames();
  arrange();
  if (!state.shown) {
    state.shown = items[0];
    writePeek(items[0]);
  }
}

el("toggles").replaceChildren(...[ONE, ...featureList()].map((k) => {
  const button = make("button", "", nameOf(k));
  button.type = "button";
  button.dataset.map = k;
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => toggle(k));
  return button;
}));
el("sort").addEventListener("change", arrange);
el("filter").addEventListener("change", arrange);
el("scale").addEventListener("change", () => {
  state.scale = el("scale").value;
  for (const item of items) if (item.near) drawMap(item);
  if (state.shown) writePeek(state.shown);
});
if (el("target")) el("target").addEventListener("change", (event) => showTarget(Number(event.target.value)));

for (const button of document.querySelectorAll("[data-set-theme]")) {
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = button.dataset.setTheme;
    for (const other of document.querySelectorAll("[data-set-theme]")) other.setAttribute("aria-pressed", String(other === button));
  });
}
for (const box of document.querySelectorAll(".show-crop-maps")) {
  box.addEventListener("change", () => {
    for (const other of document.querySelectorAll(".show-crop-maps")) other.checked = box.checked;
    document.body.classList.toggle("with-maps", box.checked);
  });
}

// On paper all photos are there, seen or not, with the map of the gallery. A modal dialog would be cut at the end of the
// first page, so it is printed as part of the page.
addEventListener("beforeprint", () => {
  for (const item of items) {
    enliven(item);
    item.photo.decoding = "sync";
    drawMap(item);
  }
  if (el("comparison").matches(":modal")) {
    el("comparison").close();
    el("comparison").show();
    state.modal = true;
  }
});
addEventListener("afterprint", () => {
  if (!state.modal) return;
  state.modal = false;
  el("comparison").close();
  el("comparison").showModal();
});

takeNames();
tellKept();
showTarget(0);
for (const item of items) watcher.observe(item.node);
document.documentElement.dataset.ready = "true";
