
// The gallery of images.

// --- one image with a map on it

function frame(index, k, shared) {
  const image = data.images[index], row = rowOf(index);
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
  const numbers = make("p", "numbers"), why = make("p", "why"), usual = make("p", "usual");
  const caption = make("p", "caption", image.caption);
  caption.title = image.caption;
  node.append(pick, bars, caption, why, usual, numbers);
  const item = { index, node, pick, number, box, photo, over, bars, paths, why, usual, numbers, live: false, selected: false, peeked: false };
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
const mapShown = (item) => (state.on !== null ? state.on : item.peeked ? strongest(rowOf(item.index)) : null);

function drawMap(item) {
  const k = mapShown(item), row = rowOf(item.index);
  const want = k === null ? "" : `${state.target}:${state.rather}:${k}:${state.scale}`;
  if (item.drawn === want) return;
  item.drawn = want;
  item.over.hidden = k === null;
  item.box.classList.remove("mapped");
  if (k !== null) cover(item.box, item.over, row, k, state.scale === "shared");
}

function writeNumber(item) {
  const k = mapShown(item), row = rowOf(item.index);
  const value = k === null || k === ONE ? null : row.c[k];
  item.number.className = "number " + (value === null ? "" : side(value));
  item.number.textContent = value !== null ? signed(value) : k === ONE ? "1-Heatmap" : "";
  if (item.selected) item.number.textContent = `\u2713 ${item.number.textContent || "selected"}`;
}

function writeItem(item, largest) {
  const row = rowOf(item.index), K = row.c.length;
  item.bars.setAttribute("viewBox", `0 -10 ${K * 10} 20`);
  const rects = { raises: "", lowers: "" };
  row.c.forEach((value, k) => {
    const height = (10 * Math.abs(value)) / largest;
    rects[value > 0 ? "raises" : "lowers"] += `M${k * 10 + 1.5} 0h7v${(value > 0 ? -height : height).toFixed(2)}h-7z`;
  });
  item.paths[0].setAttribute("d", `M0 0H${K * 10}`);
  item.paths[1].setAttribute("d", rects.raises);
  item.paths[2].setAttribute("d", rects.lowers);
  const predicted = data.images[item.index].predicted_class;
  item.numbers.textContent = `${predicted ? predicted + ", " : ""}${outputText(row)}; ${unexplainedText(row)}`;
  item.why.textContent = sentencesOf(row);
  item.usual.textContent = usualOf(row);
  const top = strongest(row);
  item.pick.setAttribute("aria-label",
    `${data.images[item.index].caption}: output ${outputText(row)}, strongest ${nameOf(top)} ${signed(row.c[top])}, ${unexplainedText(row)}`);
  writeNumber(item);
}

function writeItems() {
  const largest = Math.max(1e-9, ...target().rows.map((_, index) => Math.max(...rowOf(index).c.map(Math.abs))));
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
  unexplained: (item) => -Math.abs(unexplained(rowOf(item.index))),
  prediction: (item) => -rowOf(item.index).prediction,
  unusual: (item) => USUAL.unusual(rowOf(item.index)),
  usual: (item) => USUAL.usual(rowOf(item.index)),
};

function arrange() {
  const by = el("sort").value, keep = el("filter").value;
  const key = SORTS[by] || ((item) => -rowOf(item.index).c[Number(by)]);
  const keys = new Map(items.map((item) => [item, key(item)]));
  order = items
    .filter((item) => keep === "all" || rowOf(item.index).is_positive === (keep === "own"))
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
  const row = rowOf(item.index), image = data.images[item.index];
  el("peek-title").textContent = image.caption;
  el("peek-why").textContent = sentencesOf(row);
  const total = row.c.reduce((sum, value) => sum + value, 0);
  el("peek-sum").textContent =
    `bias ${plain(row.bias)}, x-features ${signed(total)}, sum ${plain(row.sum)}; the model's output ${outputText(row)}, ${unexplainedText(row)}`;
  const ranked = featureList().sort((a, b) => row.c[b] - row.c[a]);
  el("peek-maps").replaceChildren(...[...ranked, ONE].map((k) => {
    const node = make("li");
    node.append(frame(item.index, k, state.scale === "shared"));
    node.append(make("b", k === ONE ? "" : side(row.c[k]), k === ONE ? plain(row.prediction) : signed(row.c[k])), make("span", "", nameOf(k)));
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
  el("comparison-title").textContent = `Comparison of ${selected().length}: ${labelShown()}`;
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
    const row = rowOf(item.index), line = make("tr"), name = make("th");
    name.scope = "row";
    name.append(make("b", "", plain(row.prediction)), frame(item.index, null, false), make("span", "", data.images[item.index].caption));
    line.append(name, ...shown.map((k) => {
      const cell = make("td");
      cell.append(make("b", k === ONE ? "" : side(row.c[k]), k === ONE ? plain(row.prediction) : signed(row.c[k])), frame(item.index, k, state.scale === "shared"));
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

// --- names, where the gallery shows them

function drawNames() {
  for (const button of el("toggles").children) if (button.dataset.map !== ONE) button.textContent = nameOf(Number(button.dataset.map));
  for (const option of el("sort").options) if (!(option.value in SORTS)) option.textContent = `contribution of ${nameOf(Number(option.value))}`;
  writeItems();
  if (state.shown) writePeek(state.shown);
}

function drawOutput() {
  writeItems();
  if (state.shown) writePeek(state.shown);
  arrange();
}

// --- the gallery as a whole

function offerToggles() {
  const maps = [ONE, ...featureList()];
  if (!maps.includes(state.on)) state.on = null;
  el("toggles").replaceChildren(...maps.map((k) => {
    const button = make("button", "", nameOf(k));
    button.type = "button";
    button.dataset.map = k;
    button.setAttribute("aria-pressed", String(k === state.on));
    button.addEventListener("click", () => toggle(k));
    return button;
  }));
}

function showTarget(index) {
  showChapter(index);
  offerToggles();
  offerOrders();
  writeNames();
  arrange();
  if (!state.shown) {
    state.shown = items[0];
    writePeek(items[0]);
  }
}

el("sort").addEventListener("change", arrange);
el("filter").addEventListener("change", arrange);
el("scale").addEventListener("change", () => {
  state.scale = el("scale").value;
  for (const item of items) if (item.near) drawMap(item);
  if (state.shown) writePeek(state.shown);
});

for (const box of document.querySelectorAll(".show-crop-maps")) {
  box.addEventListener("change", () => {
    for (const other of document.querySelectorAll(".show-crop-maps")) other.checked = box.checked;
    document.body.classList.toggle("with-maps", box.checked);
  });
}

// On paper all photos are there, seen or not, each beside a map: that of the whole gallery, or of the image's strongest
// x-feature. A modal dialog would be cut at the end of the first page, so it is printed as part of the page.
function mapOnPaper(item) {
  const row = rowOf(item.index), k = state.on ?? strongest(row), node = make("div", "paper-map");
  const picture = frame(item.index, k, state.scale === "shared");
  for (const image of picture.querySelectorAll("img")) image.decoding = "sync";
  const label = make("p", "map-name");
  if (k !== ONE) label.append(make("b", side(row.c[k]), signed(row.c[k])), " ");
  label.append(nameOf(k));
  node.append(picture, label);
  return node;
}

addEventListener("beforeprint", () => {
  for (const item of items) {
    enliven(item);
    item.photo.decoding = "sync";
    item.over.hidden = true;
    item.box.classList.remove("mapped");
    item.drawn = "";
    item.node.querySelector(".paper-map")?.remove();
    item.bars.before(mapOnPaper(item));
  }
  if (el("comparison").matches(":modal")) {
    el("comparison").close();
    el("comparison").show();
    state.modal = true;
  }
});
addEventListener("afterprint", () => {
  for (const item of items) {
    item.node.querySelector(".paper-map")?.remove();
    drawMap(item);
  }
  if (!state.modal) return;
  state.modal = false;
  el("comparison").close();
  el("comparison").showModal();
});

showTarget(0);
for (const item of items) watcher.observe(item.node);
document.documentElement.dataset.ready = "true";
