
// Texts and tables: tokens coloured by x-feature, or input features with their parts of each contribution.

const box = el("examples");
const COLOURS = 6, INPUTS = 12, VISIBLE = 0.15;

// A cell's value for an x-feature, in [-1, 1]: as strong as the contribution.
const strengthOf = (row, k, j) => row.maps[k][j] * row.strength[k];

// Words have the number of their x-feature, so its name has it too.
const numbered = (k) => (data.kind === "texts" && given(target().key, k) ? `${k + 1} ${nameOf(k)}` : nameOf(k));

function strongestAt(row, j) {
  return featureList().reduce((best, k) => (Math.abs(strengthOf(row, k, j)) > Math.abs(strengthOf(row, best, j)) ? k : best), 0);
}

// The contribution spread over cells in proportion to the map.
function partsOf(row, k) {
  const mass = row.maps[k].reduce((sum, value) => sum + Math.abs(value), 0);
  return row.maps[k].map((value) => (mass ? (value / mass) * Math.abs(row.c[k]) : 0));
}

function colour(node, value, k) {
  node.classList.add(k === null ? side(value) || "even" : `x${k % COLOURS}`);
  node.style.setProperty("--strength", `${Math.round(Math.min(1, Math.abs(value)) ** 0.65 * 100)}%`);
}

function tokens(row, cells) {
  const node = make("p", "tokens");
  cells.forEach((cell, j) => {
    const token = make("span", "token", cell), on = state.on;
    const k = on === null ? strongestAt(row, j) : null;
    const value = on === null ? strengthOf(row, k, j) : on === ONE ? row.one[j] : row.maps[on][j];
    colour(token, value, k);
    if (k !== null && Math.abs(value) > VISIBLE) {
      token.append(make("sub", "", String(k + 1)));
      token.classList.toggle("down", value < 0);
    }
    token.title = featureList().map((f) => `${nameOf(f)} ${signed(partsOf(row, f)[j])}`).join("\n");
    node.append(token, " ");
  });
  return node;
}

// Whole numbers, such as years, keep all their digits.
function formatted(value) {
  const digits = Math.max(4, Math.trunc(Math.abs(value)).toString().length);
  return String(Number.isInteger(value) ? value : Number(value.toPrecision(Math.min(digits, 100)))).replace("-", "\u2212");
}

function table(row, example) {
  const alone = state.on === null || state.on === ONE ? null : state.on, all = featureList();
  const shown = all.filter((k) => alone === null || alone === k), adds = Boolean(row.parts);
  const every = all.map((k) => (adds ? row.parts[k] : partsOf(row, k)));
  const weight = (j) => every.reduce((sum, parts) => sum + Math.abs(parts[j]), 0);
  const order = example.cells.map((_, j) => j).sort((a, b) => weight(b) - weight(a) || a - b);
  const deepest = Math.max(1e-30, ...every.flat().map(Math.abs));
  const node = make("table", "inputs"), head = make("tr"), body = make("tbody"), foot = make("tfoot");
  head.append(make("th", "", "input"));
  if (example.values) head.append(make("th", "", "value"));
  if (example.values && data.means) head.append(make("th", "mean", "average"));
  const together = adds && shown.length > 1;
  if (together) head.append(make("th", "", "together"));
  for (const k of shown) head.append(make("th", "", nameOf(k)));
  for (const cell of head.children) cell.scope = "col";
  const digits = target().decimals + 1;
  const before = 1 + (example.values ? (data.means ? 2 : 1) : 0);
  const part = (value, bold) => {
    const cell = make("td", bold ? "part together" : "part", signed(value, digits));
    if (!bold) colour(cell, value / deepest, null);
    return cell;
  };
  for (const j of order.slice(0, INPUTS)) {
    const line = make("tr"), name = make("th", "", example.cells[j]);
    name.scope = "row";
    line.append(name);
    if (example.values) line.append(make("td", "", formatted(example.values[j])));
    if (example.values && data.means) line.append(make("td", "mean", formatted(data.means[j])));
    if (together) line.append(part(every.reduce((sum, parts) => sum + parts[j], 0), true));
    for (const k of shown) line.append(part(every[k][j], false));
    body.append(line);
  }
  const ending = (title, values) => {
    const line = make("tr"), name = make("th", "", title);
    name.scope = "row";
    name.colSpan = before;
    line.append(name);
    if (together) line.append(part(values.reduce((sum, value) => sum + value, 0), true));
    line.append(...shown.map((k) => part(values[k], true)));
    foot.append(line);
  };
  if (adds) {
    const left = order.slice(INPUTS), sum = (parts, some) => some.reduce((total, j) => total + parts[j], 0);
    if (left.length) ending(`${left.length} other inputs`, every.map((parts) => sum(parts, left)));
    const rest = every.map((parts, k) => row.c[k] - sum(parts, order));
    if (rest.some((value) => Number(value.toFixed(digits)))) ending("no single input", rest);
    ending("sum: the contribution", row.c);
  }
  const top = make("thead");
  top.append(head);
  node.append(top, body, foot);
  const scroller = make("div", "wide");
  scroller.tabIndex = 0;
  scroller.append(node);
  if (!adds && order.length > INPUTS) scroller.append(make("p", "meaning", `and ${order.length - INPUTS} more inputs with less`));
  return scroller;
}

// The output as a sum, so that the numbers below can be followed.
function numbersOf(row, example) {
  const said = example.predicted_class ? `${example.predicted_class}, ` : "";
  if (data.kind === "texts") return `${said}${outputText(row)}; ${unexplainedText(row)}`;
  const total = row.c.reduce((sum, value) => sum + value, 0);
  return `${said}${outputText(row)} ${data.unit} = bias ${plain(row.bias)}, x-features ${signed(total)}, ${unexplainedText(row)}`;
}

// What the colours say. On paper, where the buttons are gone, it also lists the x-features.
function drawKey() {
  const key = el("key"), all = state.on === null && data.kind === "texts";
  key.replaceChildren(...(all ? featureList() : []).map((k) => {
    const node = make("span", "named on-paper");
    node.append(make("span", `dot x${k % COLOURS}`), numbered(k));
    return node;
  }));
  key.append(all ? "Colour and number of a word: the x-feature that it drives most. The colour is no sign: a dashed line below a word says that it lowers the number."
    : `${state.on === ONE ? "1-Heatmap: o" : state.on === null ? "O" : `${nameOf(state.on)}: o`}range raises the number, blue lowers it.`);
}

const SORTS = {
  given: () => 0,
  unexplained: (index) => -Math.abs(unexplained(rowOf(index))),
  prediction: (index) => -rowOf(index).prediction,
  unusual: (index) => USUAL.unusual(rowOf(index)),
  usual: (index) => USUAL.usual(rowOf(index)),
};

function drawExamples() {
  const by = el("sort").value || "given", keep = el("filter").value, rows = target().rows.map((_, index) => rowOf(index));
  const key = SORTS[by] || ((index) => -rows[index].c[Number(by)]);
  const order = rows.map((_, index) => index)
    .filter((index) => keep === "all" || rows[index].is_positive === (keep === "own"))
    .sort((a, b) => key(a) - key(b) || a - b);
  box.replaceChildren(...order.map((index) => {
    const example = data.images[index], row = rows[index], node = make("li", "example");
    const header = make("header");
    header.append(make("b", "caption", example.caption), make("span", "numbers", numbersOf(row, example)));
    node.append(header, make("p", "why", sentencesOf(row)), make("p", "usual", usualOf(row)), data.kind === "texts" ? tokens(row, example.cells) : table(row, example));
    return node;
  }));
}

function drawNames() {
  for (const button of el("toggles").children) {
    const k = button.dataset.map;
    if (k !== "all" && k !== ONE) button.lastChild.textContent = numbered(Number(k));
  }
  for (const option of el("sort").options) if (!(option.value in SORTS)) option.textContent = `contribution of ${nameOf(Number(option.value))}`;
  drawExamples();
  drawKey();
}

const drawOutput = drawExamples;

function offerToggles() {
  const maps = ["all", ...featureList(), ...(data.kind === "texts" ? [ONE] : [])];
  if (!maps.includes(state.on)) state.on = null;
  el("toggles").replaceChildren(...maps.map((k) => {
    const button = make("button");
    button.type = "button";
    button.dataset.map = k;
    button.setAttribute("aria-pressed", String(k === (state.on ?? "all")));
    if (data.kind === "texts" && k !== "all" && k !== ONE) button.append(make("span", `dot x${k % COLOURS}`));
    button.append(make("span", "", k === "all" ? "all x-features" : k === ONE ? "1-Heatmap" : numbered(k)));
    button.addEventListener("click", () => toggle(k));
    return button;
  }));
}

function showTarget(index) {
  showChapter(index);
  offerToggles();
  offerOrders();
  writeNames();
}

function toggle(k) {
  state.on = k === "all" ? null : k;
  for (const button of el("toggles").children) button.setAttribute("aria-pressed", String(button.dataset.map === String(k)));
  drawExamples();
  drawKey();
}

el("sort").addEventListener("change", drawExamples);
el("filter").addEventListener("change", drawExamples);

showTarget(0);
document.documentElement.dataset.ready = "true";
