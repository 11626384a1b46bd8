"use strict";

// One page for every step of a study. Texts are set as text only; nothing that comes from anywhere is read as markup.

const root = document.documentElement;
const el = (id) => document.getElementById(id);
const main = el("main");
const live = el("live");

/** Makes an element. Properties that begin with "on" are listeners, others with "-" or "role" are attributes. */
function h(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role" || name === "for") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A random name of a window or an event. */
function name() {
  return [...crypto.getRandomValues(new Uint8Array(9))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

class Moved extends Error {}
class Gone extends Error {}
class Refused extends Error {}

/* Where answers go: to the server, or, without one, into this browser until they are downloaded. */

class Server {
  constructor() {
    this.base = root.dataset.base;
    this.key = `study ${this.base}`;
    this.tab = name();
  }

  async ask(path, body) {
    const request = { method: "POST", headers: { "Content-Type": "application/json" }, credentials: "omit" };
    const text = JSON.stringify({ tab: this.tab, ...body });
    const response = await fetch(`${this.base}/${path}`, { ...request, body: text, keepalive: text.length < 60000 });
    if (response.status === 409) throw new Moved();
    if (response.status === 404 || response.status === 410) throw new Gone();
    if (response.status === 400) throw new Refused((await response.json()).error);
    if (!response.ok) throw new TypeError(`the server answers ${response.status}`);
    return response.json();
  }

  claim() { return this.ask("claim", {}); }
  record(events) { return this.ask("events", { events }); }
  answer(step, data, at, events) { return this.ask("answer", { step, data, at, events }); }
  withdraw(id) { return this.ask("withdraw", { id }); }

  async media(file) {
    const response = await fetch(`${this.base}/media/${file}`, { credentials: "omit" });
    if (response.status === 404) throw new Gone();
    if (!response.ok) throw new TypeError(`the server answers ${response.status}`);
    return response.json();
  }
}

class Folder {
  constructor() {
    this.code = new URLSearchParams(location.search).get("p") || "";
    this.key = `study ${location.pathname} ${this.code}`;
    this.tab = name();
  }

  read() { return JSON.parse(localStorage.getItem(`${this.key} kept`)) || { step: 0, answers: [], events: [], started: Date.now() }; }
  write(kept) { localStorage.setItem(`${this.key} kept`, JSON.stringify(kept)); }
  mine() { if (localStorage.getItem(`${this.key} tab`) !== this.tab) throw new Moved(); }

  async claim() {
    if (!/^[\w-]+$/.test(this.code)) throw new Gone();
    const response = await fetch(`sessions/${this.code}.json`);
    if (!response.ok) throw new Gone();
    this.session = await response.json();
    localStorage.setItem(`${this.key} tab`, this.tab);
    this.write(this.read());
    return this.state();
  }

  state() {
    const kept = this.read();
    const { id, steps } = this.session;
    const state = { id, step: kept.step, steps: steps.length };
    if (kept.step < steps.length) {
      state.now = steps[kept.step];
      state.events = kept.events.filter((event) => event.step === kept.step);
    }
    return state;
  }

  async record(events) {
    this.mine();
    const kept = this.read();
    const known = new Set(kept.events.map((event) => event.id));
    kept.events.push(...events.filter((event) => !known.has(event.id)));
    this.write(kept);
  }

  async answer(step, data, at, events) {
    await this.record(events);
    const kept = this.read();
    if (step === kept.step) {
      kept.answers.push({ data, at });
      kept.step += 1;
      this.write(kept);
    }
    return this.state();
  }

  async withdraw() {
    for (const part of ["kept", "tab"]) localStorage.removeItem(`${this.key} ${part}`);
  }

  async media(file) {
    const response = await fetch(`media/${file}`);
    if (!response.ok) throw new TypeError(`the server answers ${response.status}`);
    return response.json();
  }

  file() {
    const { started, answers, events } = this.read();
    return JSON.stringify({ captum_xnn: "answers", version: 1, session: this.code, started, answers, events });
  }
}

const backend = root.dataset.mode === "static" ? new Folder() : new Server();

/* What is not yet stored lies in this browser, so that neither a reload nor a lost connection loses it. */

let state = null;
let outbox = [];
let sending = null;
let timer = null;
let wait = 0;
let moved = false;

// What a screen holds back for a moment, such as a comment that is being typed, is recorded before the page goes.

let held = null;
function settle() { if (held) held(); }
addEventListener("pagehide", settle);

// Each window keeps its own, under its name: two windows must not overwrite each other's.

function keep() {
  const own = `${backend.key}/${backend.tab}`;
  try {
    if (outbox.length) localStorage.setItem(own, JSON.stringify(outbox));
    else localStorage.removeItem(own);
  } catch { /* a browser that keeps nothing still sends */ }
}

/** What this and earlier windows of the session have kept, each event once. */
function kept() {
  const found = new Map(outbox.map((event) => [event.id, event]));
  try {
    for (const other of Object.keys(localStorage).filter((k) => k.startsWith(`${backend.key}/`))) {
      for (const event of JSON.parse(localStorage.getItem(other)) || []) found.set(event.id, event);
    }
  } catch { /* nothing was kept, or not by this page */ }
  return [...found.values()];
}

/** Removes what the session's windows have kept; if events are given, only where no others are kept beside them. */
function forget(events) {
  const ids = events && new Set(events.map((event) => event.id));
  try {
    for (const other of Object.keys(localStorage).filter((k) => k.startsWith(`${backend.key}/`))) {
      if (ids && !JSON.parse(localStorage.getItem(other)).every((event) => ids.has(event.id))) continue;
      localStorage.removeItem(other);
    }
  } catch { /* nothing was kept */ }
}

const SAID = { saved: "All saved", saving: "Saving …", offline: "No connection – your answers are kept here", full: "This browser can keep no more answers" };
function status(of) {
  if (el("status").dataset.state === of && el("status-text").textContent === SAID[of]) return;
  el("status").dataset.state = of;
  el("status-text").textContent = SAID[of];
}

function record(kind, data) {
  if (!state || !state.now || moved) return;
  // Of a text that is being typed only the last version has to be sent.
  if (kind === "fill") outbox = outbox.filter((event) => event.kind !== "fill" || event.step !== state.step || event.data.name !== data.name);
  outbox.push({ id: name(), step: state.step, kind, at: clock(), data });
  keep();
  status("saving");
  later(300);
}

function later(milliseconds) {
  clearTimeout(timer);
  timer = setTimeout(flush, milliseconds);
}

async function flush() {
  if (sending || !outbox.length || moved) return;
  const events = outbox.slice(0, 100);
  sending = backend.record(events);
  try {
    await sending;
    sent(events);
    wait = 0;
  } catch (error) {
    failed(error, events);
  } finally {
    sending = null;
  }
  if (outbox.length && !moved) later(wait);
}

function sent(events) {
  const ids = new Set(events.map((event) => event.id));
  outbox = outbox.filter((event) => !ids.has(event.id));
  keep();
  if (!outbox.length) status("saved");
}

function failed(error, events) {
  if (error instanceof Moved) return elsewhere();
  if (error instanceof Gone) return over();
  if (error instanceof Refused) { sent(events); return undefined; }
  wait = Math.min(10000, (wait || 500) * 2);
  status(error instanceof DOMException ? "full" : "offline");
  return undefined;
}

addEventListener("online", () => { wait = 0; later(0); });
document.addEventListener("visibilitychange", () => {
  if (!state || !state.now) return;
  settle();
  record(document.hidden ? "hide" : "show", {});
  tick();
  if (document.hidden) flush();
});

/* Time that a step was looked at, in milliseconds, over reloads. */

let spent = 0;
let since = performance.now();
let counting = !document.hidden;
function tick() {
  const now = performance.now();
  if (counting) spent += now - since;
  since = now;
  counting = !document.hidden;
}
function clock() { tick(); return Math.round(spent); }

/* From step to step. */

async function start() {
  // Until the session is this window's, nothing else may be sent: it would be refused, and the window held for moved.
  moved = true;
  clearTimeout(timer);
  if (sending) await sending.catch(() => {});
  try {
    outbox = kept();
    let next = await backend.claim();
    // Those of this browser's last window that are not yet stored belong to the steps where they were made.
    if (outbox.length) {
      const events = outbox;
      for (let i = 0; i < events.length; i += 100) await backend.record(events.slice(i, i + 100));
      forget(events);
      sent(events);
      next = await backend.claim();
    }
    moved = false;
    status("saved");
    return go(next);
  } catch (error) {
    if (error instanceof Moved) return elsewhere();
    if (error instanceof Gone) return over();
    if (error instanceof DOMException) {
      status("full");
      return screen("text", h("h1", {}, "This browser keeps no answers"),
        h("p", {}, "Please allow this page to store data in your browser, or use another browser. Then open your link again."));
    }
    if (error instanceof Refused) { outbox = []; forget(); return setTimeout(start, 500); }
    status("offline");
    return setTimeout(start, 2000);
  }
}

async function go(next) {
  state = next;
  el("code").textContent = state.id;
  el("withdraw").hidden = !state.now;
  const share = state.step / state.steps;
  el("progress").value = share;
  el("progress-text").textContent = `Step ${Math.min(state.step + 1, state.steps)} of ${state.steps}`;
  const events = state.events || [];
  spent = Math.max(0, ...events.map((event) => event.at));
  since = performance.now();
  main.inert = true; // what is still on the page belongs to another step, or to how this one was before
  document.onkeydown = null;
  held = null;
  root.dataset.step = state.now ? state.now.kind : "end";
  const shown = state.now ? SCREENS[state.now.kind] : end;
  const number = state.step;
  try {
    await shown(state.now, events);
  } catch (error) {
    if (error instanceof Moved || error instanceof Gone) return start();
    if (!(error instanceof TypeError)) throw error;
    status("offline");
    return setTimeout(() => { if (state && state.step === number) go(next); }, 2000);
  }
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  scrollTo(0, 0);
  const heading = main.querySelector("h1");
  if (heading) { heading.tabIndex = -1; heading.focus({ preventScroll: true }); }
  record("open", {});
  if (!state.now) status("saved");
  root.dataset.ready = String(state.step);
  return undefined;
}

/** Sends the answer to this step until it is stored, then shows the next one. */
async function submit(data, button) {
  if (button.getAttribute("aria-disabled") === "true") return;
  settle();
  const text = button.textContent;
  const step = state.step;
  button.setAttribute("aria-disabled", "true");
  button.textContent = "Saving …";
  main.inert = true; // until it is stored, the page shows what is sent
  if (sending) await sending.catch(() => {});
  for (;;) {
    clearTimeout(timer);
    const events = outbox.slice(0, 400);
    try {
      status("saving");
      const next = await backend.answer(step, data, clock(), events);
      sent(events);
      wait = 0;
      status("saved");
      await go(next);
      return;
    } catch (error) {
      if (error instanceof Moved) { elsewhere(); return; }
      if (error instanceof Gone) { over(); return; }
      if (error instanceof Refused) {
        later(300);
        main.inert = false;
        button.focus();
        button.setAttribute("aria-disabled", "false");
        button.textContent = text;
        say(`This was not accepted: ${error.message}`);
        return;
      }
      status(error instanceof DOMException ? "full" : "offline");
      wait = Math.min(10000, (wait || 500) * 2);
      await new Promise((done) => { setTimeout(done, wait); });
      if (moved || !state || state.step !== step) return;
    }
  }
}

function say(text) {
  const place = main.querySelector(".error");
  if (place) place.textContent = text;
  live.textContent = text;
}

function elsewhere() {
  settle();
  moved = true;
  const dialog = el("ask");
  // The dialog stays until the session is here again: nothing behind it would be recorded.
  const go = h("button", { className: "go", type: "button", onclick: () => {
    if (go.getAttribute("aria-disabled") === "true") return;
    go.setAttribute("aria-disabled", "true");
    go.textContent = "Loading …";
    start();
  } }, "Continue here");
  dialog.replaceChildren(
    h("h2", { id: "ask-title" }, "Open in another window"),
    h("p", {}, "This study continues in another window or on another device. Nothing is lost."),
    go,
  );
  dialog.oncancel = (event) => event.preventDefault();
  if (!dialog.open) dialog.showModal();
}

function over() {
  if (root.dataset.step === "withdrawn") return; // a late answer to what was sent before
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  state = null;
  outbox = [];
  forget();
  clearTimeout(timer);
  el("withdraw").hidden = true;
  root.dataset.step = "over";
  screen("text", h("h1", {}, "This link does not work"),
    h("p", {}, "It has been used, or it is not complete. Please check it, or ask for a new one."));
}

function screen(className, ...children) {
  main.inert = false;
  main.className = className;
  main.replaceChildren(...children.flat().filter(Boolean));
}

el("withdraw").addEventListener("click", () => {
  const dialog = el("ask");
  const close = () => dialog.close();
  dialog.replaceChildren(
    h("h2", { id: "ask-title" }, "Withdraw from the study?"),
    h("p", {}, "All your answers are deleted at once. This cannot be undone."),
    h("div", { className: "actions" },
      h("button", { className: "plain", type: "button", onclick: close }, "Go on with the study"),
      h("button", { className: "go", type: "button", id: "withdraw-yes", onclick: async () => {
        try { await backend.withdraw(state.id); } catch (error) {
          if (!(error instanceof Gone)) { status("offline"); return; }
        }
        close();
        state = null; outbox = []; forget(); clearTimeout(timer);
        el("withdraw").hidden = true;
        root.dataset.step = "withdrawn";
        screen("text", h("h1", {}, "You have withdrawn"), h("p", {}, "Your answers are deleted. Thank you for your time."));
      } }, "Delete my answers"),
    ),
  );
  dialog.oncancel = null;
  dialog.showModal();
});

/* Pictures. */

function signed(value) {
  const text = (value > 0 ? "+" : "") + value.toFixed(2);
  return (Number(text) === 0 ? "0.00" : text).replace("-", "\u2212");
}

function picture(image, map, label) {
  const frame = h("span", { className: `frame${image.pixels ? " pixels" : ""}${map ? " mapped" : ""}` },
    h("img", { className: "photo", src: image.src, alt: label || "", draggable: false }));
  frame.style.setProperty("--ratio", String(image.ratio || 1));
  if (map) frame.append(h("img", { className: "over", src: map.src, alt: "", draggable: false }));
  return frame;
}

function value(map) {
  if (!map || map.c === undefined) return null;
  return h("b", { className: `value ${map.c < 0 ? "lowers" : "raises"}` }, signed(map.c));
}

function called(stage, i) { return stage === "single" ? "Heatmap" : `Feature ${i + 1}`; }

function mapList(image, maps, stage, withImage) {
  return h("ul", { className: "maps" },
    withImage ? h("li", { className: "of-image" }, picture(image), h("span", { className: "called" }, "image")) : null,
    maps.map((map, i) => h("li", {}, value(map), picture(image, map), h("span", { className: "called" }, called(stage, i)))));
}

function legend(maps, for_what = "for the agent’s answer") {
  if (!maps.length || maps[0].c === undefined) return null;
  return h("p", { className: "legend" }, h("span", {}, h("b", { className: "raises" }, "+ red"), ` speaks ${for_what}`),
    h("span", {}, h("b", { className: "lowers" }, "\u2212 blue"), " speaks against it"));
}

/* Screens of words. */

function heading(step, text) {
  return [step.part ? h("p", { className: "part" }, `Part ${step.part} of ${step.parts}`) : null, h("h1", {}, text)];
}

function go_on(text, data) {
  const button = h("button", { className: "go", type: "button", id: "next" }, text);
  button.addEventListener("click", () => submit(typeof data === "function" ? data() : data, button));
  return button;
}

function consent(step) {
  const box = h("input", { type: "checkbox", id: "agree" });
  const button = go_on("Begin", { agreed: true });
  button.setAttribute("aria-disabled", "true");
  box.addEventListener("change", () => button.setAttribute("aria-disabled", String(!box.checked)));
  screen("text", h("div", { className: "sheet" }, h("h1", {}, "Before you begin"),
    step.paragraphs.map((text) => h("p", {}, text)),
    step.contact ? h("p", {}, `Questions: ${step.contact}`) : null,
    h("p", {}, "Your code stands at the foot of each page. Note it down: with it you can have your answers deleted later."),
    h("label", { className: "agree" }, box, h("span", {}, "I have read this, I am of age, and I agree to take part.")),
    h("div", { className: "actions" }, button)));
}

function radios(form, title, group, options, className, filled, small) {
  const set = h("fieldset", {}, h("legend", {}, title, small ? h("small", {}, small) : null));
  const row = h("div", { className });
  row.style.setProperty("--points", options.length);
  options.forEach(([text, given], i) => {
    const input = h("input", { type: "radio", name: group, value: String(given), id: `${group}-${i}` });
    if (filled[group] !== undefined && String(filled[group]) === String(given)) input.checked = true;
    input.addEventListener("change", () => record("fill", { name: group, value: given }));
    row.append(h("label", { className: "option" }, input, h("span", {}, text)));
  });
  set.append(row);
  return set;
}

/** What was filled in before a reload. */
function filledIn(events) {
  const found = {};
  for (const event of events) if (event.kind === "fill") found[event.data.name] = event.data.value;
  return found;
}

function chosen(group) {
  const input = main.querySelector(`input[name="${CSS.escape(group)}"]:checked`);
  return input ? input.value : null;
}

function background(step, events) {
  const filled = filledIn(events);
  const sets = step.questions.map(({ name: group, text, options }) =>
    radios(null, text, group, options.map((option) => [option, option]), "options", filled));
  screen("text", h("div", { className: "sheet" }, h("h1", {}, "A few questions about you"),
    h("p", { className: "lead" }, "All of them are optional. Leave out whatever you do not want to answer."), sets,
    h("div", { className: "actions" }, go_on("Continue", () =>
      Object.fromEntries(step.questions.map(({ name: group }) => [group, chosen(group) || ""]))))));
}

const TASK = {
  sort: "You will see a few images and sort them into groups, so that the images of a group are of the same kind. The kinds look alike: you are not expected to know them.",
  agreement: "You will see images with the answer of an AI agent, and say whether it is right.",
  distinction: "You will see an image with explanations of several answers, and say which of them an AI agent gave.",
  prediction: "You will see examples of an AI agent’s answers, and predict its answer on new images.",
};
const STAGE = {
  none: "In this part you see the images alone. Go by what you see.",
  single: "In this part an AI agent helps you. For each image a heatmap shows where the agent looked when it told the images apart.",
  xnn: "In this part an AI agent helps you. It uses several features of an image together. For each image you see a heatmap of every feature, and above it how much that feature contributed to the agent’s answer: red with + speaks for it, blue with \u2212 against it.",
};

function intro(step) {
  screen("text", h("div", { className: "sheet" }, heading(step, step.part === 1 ? "The task" : "The next part"),
    step.part === 1 ? h("p", {}, TASK[step.task]) : null, h("p", {}, STAGE[step.stage]),
    step.stage !== "none" ? h("p", {}, "Look at the maps as you like: on one image, on all at once, or side by side.") : null,
    h("div", { className: "actions" }, go_on("Show me the images", {}))));
}

function confidence(step, events) {
  const filled = filledIn(events);
  const points = step.options.map((text, i) => [text, i]);
  const question = step.task === "sort"
    ? "What is your confidence level that the answers you picked will group all the samples correctly?"
    : "What is your confidence level that your answers are right?";
  const sets = step.datasets.map(({ name: group, title }) => radios(null, title, `c ${group}`, points, "likert", filled));
  if (step.attention) {
    sets.push(radios(null, `To show that you read each question, please choose “${step.check}” here.`, "attention", points, "likert", filled));
  }
  const error = h("p", { className: "error", role: "alert" });
  screen("text", h("div", { className: "sheet" }, heading(step, question), sets, error,
    h("div", { className: "actions" }, complete(() => {
      const data = { confidence: {} };
      for (const { name: group } of step.datasets) data.confidence[group] = chosen(`c ${group}`);
      if (step.attention) data.attention = chosen("attention");
      return data;
    }))));
}

/** A button that sends numbers once all of them are there. */
function complete(gather) {
  const button = h("button", { className: "go", type: "button", id: "next" }, "Continue");
  button.addEventListener("click", () => {
    let missing = 0;
    const numbers = (given) => {
      if (given === null) { missing += 1; return null; }
      if (typeof given === "object") return Object.fromEntries(Object.entries(given).map(([k, v]) => [k, numbers(v)]));
      return Number(given);
    };
    const { comments, ...rest } = gather();
    const data = numbers(rest);
    if (comments !== undefined) data.comments = comments;
    if (missing) {
      say(`Please answer ${missing === 1 ? "the question that is" : `the ${missing} questions that are`} still open.`);
      const open = [...main.querySelectorAll("fieldset")].find((set) => !set.querySelector(":checked"));
      if (open) { open.scrollIntoView({ block: "center" }); open.querySelector("input").focus({ preventScroll: true }); }
      return;
    }
    submit(data, button);
  });
  return button;
}

function final(step, events) {
  const filled = filledIn(events);
  const points = step.options.map((text, i) => [text, i]);
  const agent = ({ stage, part }) => `The agent with ${stage === "single" ? "one heatmap" : "several features"} (part ${part})`;
  const sets = step.agents.map((a) => radios(null, agent(a), `a ${a.name}`, points, "likert", filled,
    "How do you rate how well it helped you to tell the images apart?"));
  const hard = radios(null, "How difficult did you find the task?", "difficulty", step.difficulty.map((n) => [String(n), n]), "numbers", filled);
  hard.append(h("p", { className: "ends" }, h("span", {}, "0: very easy"), h("span", {}, `${step.difficulty.at(-1)}: very difficult`)));
  const box = h("textarea", { id: "comments", maxLength: 5000, value: filled.comments || "" });
  let typed = null;
  held = () => {
    if (typed !== null) record("fill", { name: "comments", value: box.value.slice(0, 5000) });
    clearTimeout(typed);
    typed = null;
  };
  box.addEventListener("input", () => { if (typed === null) typed = setTimeout(settle, 500); });
  const error = h("p", { className: "error", role: "alert" });
  screen("text", h("div", { className: "sheet" }, h("h1", {}, step.agents.length ? "How well did the agents help you?" : "To finish"),
    sets, hard,
    h("fieldset", {}, h("legend", {}, h("label", { htmlFor: "comments" }, "Is there anything that you want to tell us?"),
      h("small", {}, "Optional. Please write nothing about who you are.")), box),
    error, h("div", { className: "actions" }, complete(() => {
      return {
        agents: Object.fromEntries(step.agents.map((a) => [a.name, chosen(`a ${a.name}`)])),
        difficulty: chosen("difficulty"), comments: box.value,
      };
    }))));
}

function end() {
  el("progress").value = 1;
  el("progress-text").textContent = "Done";
  const parts = [h("h1", {}, "Thank you"), h("p", {}, "You have come to the end of the study."),
    h("p", {}, "To have your answers deleted, tell us your code: ", h("b", {}, state.id), ".")];
  if (backend instanceof Folder) {
    const link = h("a", { className: "button", download: `answers-${state.id}.json`, id: "download" }, "Download my answers");
    link.href = URL.createObjectURL(new Blob([backend.file()], { type: "application/json" }));
    parts.splice(1, 1, h("p", {}, "Please download your answers and send the file to those who invited you. Until then they are only in this browser."),
      h("p", {}, link));
  } else {
    parts.push(h("p", {}, "Your answers are saved. You may close this page."));
  }
  screen("text", h("div", { className: "sheet" }, parts));
}

/* Sorting. */

async function sort(step, events) {
  const { images } = await backend.media(step.media);
  const byId = new Map(images.map((image) => [image.id, image]));
  const places = new Map(step.order.map((id) => [id, 0]));
  const numbers = new Map(step.order.map((id, i) => [id, i + 1]));
  const selected = new Set();
  const past = [];
  const maps = images[0].maps;
  const stage = step.stage === "practice" ? (maps.length ? "xnn" : "none") : step.stage;
  let shown = null;
  let focus = null;
  let drag = null;
  let quiet = false;

  function replay(event) {
    if (event.kind !== "move" && event.kind !== "undo") return;
    const moves = event.data.to.filter(([id, group]) => places.has(id) && group >= 0 && group <= step.groups);
    if (event.kind === "undo") past.pop();
    else past.push(moves.map(([id]) => [id, places.get(id)]));
    for (const [id, group] of moves) places.set(id, group);
  }
  events.forEach(replay);

  const tiles = new Map();
  for (const id of step.order) {
    const image = byId.get(id);
    const frame = picture(image);
    const over = h("img", { className: "over", alt: "", draggable: false, hidden: true });
    frame.append(over);
    const number = h("b", { className: "value", hidden: true });
    const tile = h("button", { type: "button", className: "tile", "aria-pressed": "false", "data-image": id }, number, frame);
    tile.addEventListener("click", (event) => { if (drag === null && !quiet) choose(id, event); });
    tile.addEventListener("pointerdown", (event) => lift(event, id));
    tile.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse" && !drag) inspect(id); });
    tile.addEventListener("focus", () => inspect(id));
    tile.addEventListener("contextmenu", (event) => event.preventDefault());
    tiles.set(id, { tile, over, frame, number, item: h("li", {}, tile) });
  }

  const piles = [];
  for (let g = 0; g <= step.groups; g += 1) {
    const list = h("ul", { className: "tiles", role: "list" });
    const count = h("span", { className: "count" });
    const here = h("button", { type: "button", className: "here", hidden: true, onclick: () => move([...selected], g) }, "Move here");
    const title = g ? h("h2", {}, h("span", { className: "sr" }, "Group "), h("span", { className: "key" }, String(g)), count)
      : h("h2", {}, "To sort", count);
    const pile = h("section", { className: `pile${g ? "" : " tray"}`, "data-group": String(g), "aria-label": g ? `Group ${g}` : "Images to sort" },
      h("header", {}, title, here), list);
    piles.push({ pile, list, count, here });
  }

  const toggles = maps.map((_, i) => {
    const button = h("button", { type: "button", className: "button", "aria-pressed": "false", "data-map": String(i) }, stage === "single" ? "Heatmap" : String(i + 1));
    if (stage !== "single") button.setAttribute("aria-label", `Feature ${i + 1} on all images`);
    button.addEventListener("click", () => toggle(i));
    return button;
  });
  const compareButton = h("button", { type: "button", className: "button", id: "compare-open", onclick: () => compare() }, "Compare");
  const undoButton = h("button", { type: "button", className: "button", id: "undo", onclick: () => undo() }, "Undo");
  const tools = h("div", { className: "tools", role: "toolbar", "aria-label": "Tools" },
    maps.length ? h("div", {}, h("span", { className: "label" }, stage === "single" ? "On all images:" : "Feature on all images:"), toggles) : null,
    h("div", {}, compareButton, undoButton));

  const peekTitle = h("h2", {});
  const peekBody = h("div", {});
  const peekTo = h("div", { className: "to", role: "group", "aria-label": "Move this image" }, h("span", {}, "Move to"));
  for (let g = 1; g <= step.groups; g += 1) {
    peekTo.append(h("button", { type: "button", className: "button", "data-to": String(g), "aria-label": `Group ${g}`, onclick: () => move(carried(focus), g) }, String(g)));
  }
  const peek = h("aside", { className: "peek", id: "peek", "aria-label": "The image that you point at" },
    h("header", {}, peekTitle, h("button", { type: "button", className: "quiet", id: "peek-close", onclick: () => peek.classList.remove("open") }, "Close")),
    peekBody, peekTo);

  const button = h("button", { className: "go", type: "button", id: "next" }, "Done");
  button.addEventListener("click", () => {
    const left = [...places.values()].filter((g) => g === 0).length;
    if (left) { say(`${left === 1 ? "One image is" : `${left} images are`} still to be sorted.`); return; }
    submit({ groups: Object.fromEntries(places) }, button);
  });
  const left = h("p", { className: "left" });

  const groups = h("div", { className: "groups" }, piles.slice(1).map(({ pile }) => pile));
  groups.style.setProperty("--groups", String(Math.min(step.groups, 5)));
  const practice = step.stage === "practice";
  const words = practice
    ? "Try everything out on these shapes: put shapes of the same kind into the same group. These answers are only for practice."
    : `Sort the images into ${step.groups} groups of the same kind. A group may stay small or empty.`;
  screen("sorting",
    heading(step, practice ? "Practice" : step.title),
    h("p", { className: "lead" }, words),
    h("details", { open: practice }, h("summary", {}, "How to sort"),
      h("ul", { className: "keys" },
        h("li", {}, "Drag an image to a group; on a touch screen, hold it first. Or select images and press “Move here”."),
        h("li", {}, "Keys: ", h("kbd", {}, "Tab"), " and arrows go to an image, ", h("kbd", {}, "1"), " to ", h("kbd", {}, String(step.groups)),
          " move it, ", h("kbd", {}, "0"), " takes it back, ", h("kbd", {}, "Space"), " selects it, ", h("kbd", {}, "Z"), " undoes, ", h("kbd", {}, "C"), " compares."),
        maps.length ? h("li", {}, "Point at an image to see its maps. The buttons show one map on all images. Select images and press “Compare” to see all their maps side by side.") : null)),
    maps.length ? legend(maps) : null,
    tools,
    h("div", { className: "board" }, h("div", { className: "piles" }, piles[0].pile, groups), peek),
    h("div", { className: "done" }, h("p", { className: "error", role: "alert" }), left, button));

  function carried(id) { return selected.has(id) ? [...selected] : id ? [id] : []; }

  function place() {
    const active = document.activeElement;
    piles.forEach(({ list, count, here }, g) => {
      const inside = step.order.filter((id) => places.get(id) === g);
      const wanted = inside.map((id) => tiles.get(id).item);
      if (!wanted.length) wanted.push(h("li", { className: "empty" }, g ? "Empty" : "All images are sorted."));
      list.replaceChildren(...wanted);
      count.textContent = g ? ` ${inside.length}` : ` ${inside.length}`;
      here.hidden = ![...selected].some((id) => places.get(id) !== g);
    });
    for (const [id, { tile }] of tiles) {
      const g = places.get(id);
      tile.setAttribute("aria-pressed", String(selected.has(id)));
      const map = shown === null ? null : byId.get(id).maps[shown];
      const worth = map && map.c !== undefined ? `, ${called(stage, shown)} ${signed(map.c)}` : "";
      tile.setAttribute("aria-label", `Image ${numbers.get(id)}, ${g ? `in group ${g}` : "to sort"}${worth}`);
    }
    const open = [...places.values()].filter((g) => g === 0).length;
    button.setAttribute("aria-disabled", String(open > 0));
    left.textContent = open ? `${open} left to sort` : "All sorted. You can still change everything.";
    compareButton.textContent = selected.size ? `Compare ${selected.size}` : "Compare";
    compareButton.setAttribute("aria-disabled", String(selected.size < 1));
    undoButton.setAttribute("aria-disabled", String(!past.length));
    const error = main.querySelector(".done .error");
    if (error && !open) error.textContent = "";
    if (active && active.isConnected && active !== document.activeElement) active.focus({ preventScroll: true });
    peekTo.querySelectorAll("[data-to]").forEach((b) => b.setAttribute("aria-pressed", String(focus !== null && places.get(focus) === Number(b.dataset.to))));
    tools.dataset.selected = String(selected.size);
  }

  function move(ids, g) {
    const moves = ids.filter((id) => places.get(id) !== g);
    if (!moves.length || moved) return;
    past.push(moves.map((id) => [id, places.get(id)]));
    for (const id of moves) places.set(id, g);
    record("move", { to: moves.map((id) => [id, g]) });
    selected.clear();
    place();
    live.textContent = `${moves.length === 1 ? `Image ${numbers.get(moves[0])}` : `${moves.length} images`} moved ${g ? `to group ${g}` : "back"}.`;
  }

  function undo() {
    const moves = moved ? null : past.pop();
    if (!moves) return;
    for (const [id, g] of moves) places.set(id, g);
    record("undo", { to: moves });
    place();
    live.textContent = "Undone.";
  }

  function choose(id, event) {
    if (selected.has(id)) selected.delete(id); else selected.add(id);
    record("select", { image: id, on: selected.has(id) });
    inspect(id);
    if (!event || event.detail !== 0 || peekIsSheet()) peek.classList.add("open");
    place();
  }

  function peekIsSheet() { return getComputedStyle(peek).position === "fixed"; }

  let looking = null;
  function inspect(id) {
    if (focus === id) return;
    focus = id;
    const image = byId.get(id);
    peekTitle.textContent = `Image ${numbers.get(id)}`;
    const big = picture(image);
    big.classList.add("big");
    peekBody.replaceChildren(big, maps.length ? mapList(image, image.maps, stage, true) : h("span", { hidden: true }));
    peekTo.hidden = false;
    peekTo.querySelectorAll("[data-to]").forEach((b) => b.setAttribute("aria-pressed", String(places.get(id) === Number(b.dataset.to))));
    clearTimeout(looking);
    // A glance in passing is no look.
    looking = setTimeout(() => { if (focus === id && state && state.now === step) record("inspect", { image: id }); }, 400);
  }

  function toggle(i) {
    shown = shown === i ? null : i;
    toggles.forEach((b, k) => b.setAttribute("aria-pressed", String(k === shown)));
    for (const [id, { over, frame, number }] of tiles) {
      const map = shown === null ? null : byId.get(id).maps[shown];
      over.hidden = !map;
      if (map) over.src = map.src;
      frame.classList.toggle("mapped", Boolean(map));
      number.hidden = !map || map.c === undefined;
      if (map && map.c !== undefined) {
        number.textContent = signed(map.c);
        number.className = `value ${map.c < 0 ? "lowers" : "raises"}`;
      }
    }
    record("toggle", { map: shown });
    place();
  }

  function compare() {
    const ids = step.order.filter((id) => selected.has(id));
    if (!ids.length) { live.textContent = "Select images first."; return; }
    record("compare", { images: ids });
    const dialog = el("compare");
    const rows = maps.map((_, i) => h("tr", { "data-row": String(i) }, h("th", { scope: "row" }, called(stage, i)),
      ids.map((id) => { const map = byId.get(id).maps[i]; return h("td", {}, value(map), picture(byId.get(id), map)); })));
    const switches = stage === "xnn" ? rows.map((row, i) => {
      const b = h("button", { type: "button", className: "button", "aria-pressed": "true", "aria-label": `Feature ${i + 1}` }, String(i + 1));
      b.addEventListener("click", () => {
        row.hidden = !row.hidden;
        b.setAttribute("aria-pressed", String(!row.hidden));
      });
      return b;
    }) : [];
    dialog.replaceChildren(
      h("header", {}, h("h2", { id: "compare-title" }, ids.length === 1 ? "One image" : `${ids.length} images side by side`),
        switches.length ? h("div", { className: "shown" }, h("span", { className: "label" }, "Features:"), switches) : null,
        h("button", { type: "button", className: "plain", id: "compare-close", onclick: () => dialog.close() }, "Close")),
      h("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Images side by side" },
        h("table", {}, h("thead", {}, h("tr", {}, h("td", {}), ids.map((id) => h("th", { scope: "col" }, `Image ${numbers.get(id)}`)))),
          h("tbody", {}, h("tr", {}, h("th", { scope: "row" }, "Image"), ids.map((id) => h("td", {}, picture(byId.get(id), null, `Image ${numbers.get(id)}`)))), rows))));
    dialog.oncancel = null;
    dialog.showModal();
  }

  /* Dragging: at once with a mouse or a pen, after holding with a finger, so that a swipe scrolls. */

  function lift(event, id) {
    if (event.button !== 0 || drag) return;
    const start = { x: event.clientX, y: event.clientY, pointer: event.pointerId };
    const touch = event.pointerType === "touch";
    let hold = null;
    const begin = () => {
      clearTimeout(hold);
      const ids = carried(id);
      const ghost = h("div", { className: "ghost" }, tiles.get(id).frame.cloneNode(true));
      if (ids.length > 1) ghost.append(h("span", { className: "more" }, String(ids.length)));
      document.body.append(ghost);
      document.body.classList.add("dragging");
      for (const one of ids) tiles.get(one).tile.classList.add("lifted");
      drag = { ids, ghost, over: null };
      if (touch && navigator.vibrate) navigator.vibrate(10);
      follow(start);
    };
    const follow = ({ x, y }) => {
      drag.ghost.style.transform = `translate(${x - 48}px, ${y - 48}px)`;
      const below = document.elementFromPoint(x, y);
      const pile = below && below.closest(".pile");
      if (drag.over !== pile) {
        if (drag.over) drag.over.classList.remove("target");
        drag.over = pile;
        if (pile) pile.classList.add("target");
      }
      const edge = 70;
      if (y > innerHeight - edge) scrollBy(0, 14); else if (y < edge + 40) scrollBy(0, -14);
    };
    const onmove = (e) => {
      if (e.pointerId !== start.pointer) return;
      const far = Math.hypot(e.clientX - start.x, e.clientY - start.y);
      if (!drag) {
        if (touch) { if (far > 10) stop(); return; }
        if (far > 6) begin(); else return;
      }
      e.preventDefault();
      follow({ x: e.clientX, y: e.clientY });
    };
    const onup = (e) => {
      if (e.pointerId !== start.pointer) return;
      const dropped = drag;
      stop();
      if (dropped) {
        // The click that follows a drag selects nothing.
        quiet = true;
        setTimeout(() => { quiet = false; }, 50);
        if (dropped.over) move(dropped.ids, Number(dropped.over.dataset.group));
      }
    };
    const oncancel = (e) => { if (e.pointerId === start.pointer) stop(); };
    const ontouch = (e) => { if (drag) e.preventDefault(); };
    const onkey = (e) => { if (e.key === "Escape" && drag) { stop(); quiet = true; setTimeout(() => { quiet = false; }, 400); } };
    function stop() {
      clearTimeout(hold);
      removeEventListener("pointermove", onmove);
      removeEventListener("pointerup", onup);
      removeEventListener("pointercancel", oncancel);
      removeEventListener("touchmove", ontouch);
      removeEventListener("keydown", onkey);
      if (!drag) return;
      drag.ghost.remove();
      document.body.classList.remove("dragging");
      if (drag.over) drag.over.classList.remove("target");
      for (const one of drag.ids) tiles.get(one).tile.classList.remove("lifted");
      drag = null;
    }
    if (touch) hold = setTimeout(begin, 220);
    addEventListener("pointermove", onmove, { passive: false });
    addEventListener("pointerup", onup);
    addEventListener("pointercancel", oncancel);
    addEventListener("touchmove", ontouch, { passive: false });
    addEventListener("keydown", onkey);
  }

  document.onkeydown = (event) => {
    // Letters and digits act on the board alone, and only while it has the focus.
    const tile = event.target.closest && event.target.closest(".tile");
    if (event.ctrlKey || event.metaKey || event.altKey || !tile || document.querySelector("dialog[open]")) return;
    const id = tile.dataset.image;
    const all = [...main.querySelectorAll(".tile")];
    const at = all.indexOf(tile);
    if (/^[0-9]$/.test(event.key) && Number(event.key) <= step.groups) {
      // The next image to sort is the one at hand.
      const rest = step.order.filter((other) => places.get(other) === 0 && other !== id && !selected.has(other));
      const fromTray = places.get(id) === 0;
      move(carried(id), Number(event.key));
      const behind = rest.find((other) => step.order.indexOf(other) > step.order.indexOf(id)) || rest[0];
      if (fromTray && Number(event.key) && behind) tiles.get(behind).tile.focus(); else tiles.get(id).tile.focus();
    } else if (event.key === "Backspace" || event.key === "Delete") { move(carried(id), 0); tiles.get(id).tile.focus();
    } else if (event.key === "z" || event.key === "Z") undo();
    else if (event.key === "c" || event.key === "C") { if (!selected.size) choose(id); compare();
    } else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      const next = all[at + (event.key === "ArrowRight" ? 1 : -1)];
      if (next) next.focus();
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const down = event.key === "ArrowDown";
      const own = tile.getBoundingClientRect();
      const best = all.map((other) => [other, other.getBoundingClientRect()])
        .filter(([, box]) => (down ? box.top > own.bottom - 4 : box.bottom < own.top + 4))
        .sort(([, a], [, b]) => Math.abs(a.top - own.top) + Math.abs(a.left - own.left) / 3 - Math.abs(b.top - own.top) - Math.abs(b.left - own.left) / 3)[0];
      if (best) best[0].focus();
    } else return;
    event.preventDefault();
  };

  peekTitle.textContent = "Point at an image";
  peekBody.replaceChildren(h("p", { className: "hint" }, maps.length ? "You see it here, with all its maps." : "You see it larger here."));
  peekTo.hidden = true;
  place();
}

/* One image at a time: is the agent right, which answer did it give, which will it give? */

const LETTERS = "ABCDEFGHI";
const QUESTION = {
  agree: "Is the agent right?",
  distinguish: "Which answer did the agent give?",
  predict: "What will the agent answer?",
};

async function choices(step, events) {
  const [{ images }, examples] = await Promise.all([backend.media(step.media), backend.media(step.examples)]);
  const byId = new Map(images.map((image) => [image.id, image]));
  const given = {};
  for (const event of events) if (event.kind === "choose" && byId.has(event.data.image)) given[event.data.image] = event.data.value;
  let at = Math.max(0, step.order.findIndex((id) => given[id] === undefined));
  const stage = step.stage;
  const item = h("div", {});
  const error = h("p", { className: "error", role: "alert" });
  const back = h("button", { type: "button", className: "plain", id: "back", onclick: () => { at -= 1; show(true); } }, "Back");
  const button = h("button", { className: "go", type: "button", id: "next" }, "Next");
  button.addEventListener("click", () => {
    if (given[step.order[at]] === undefined) { say("Please choose an answer first."); return; }
    if (at + 1 < step.order.length) { at += 1; show(true); return; }
    const open = step.order.findIndex((id) => given[id] === undefined);
    if (open >= 0) { at = open; show(true); return; }
    submit({ choices: given }, button);
  });
  const letters = h("div", { className: "letters" });
  for (let g = 0; g < step.groups; g += 1) {
    letters.append(h("section", { className: "pile", "aria-label": `Kind ${LETTERS[g]}` },
      h("header", {}, h("h2", {}, h("span", { className: "sr" }, "Kind "), h("span", { className: "key" }, LETTERS[g]))),
      h("div", { className: "examples" }, examples.images.filter((image) => image.group === g).map((image, i) =>
        h("div", { className: image.maps.length ? "example mapped" : "example" }, picture(image, null, `Example ${i + 1} of kind ${LETTERS[g]}`),
          image.maps.length ? mapList(image, image.maps, stage, false) : null)))));
  }
  // As many columns as leave no kind alone in its row, on wide, middle and narrow screens.
  const even = (most) => Math.ceil(step.groups / Math.ceil(step.groups / most));
  const mapped = examples.images.some((image) => image.maps.length);
  [["wide", 5], ["middle", mapped ? 2 : 4], ["narrow", mapped ? 1 : 4]].forEach(([screens, most]) => letters.style.setProperty(`--${screens}`, String(even(most))));
  const shares = mapped ? examples.images[0].maps : step.kind === "distinguish" ? images[0].options[0] : [];
  screen("choosing", heading(step, `${step.title}: ${QUESTION[step.kind]}`),
    h("details", { open: true }, h("summary", {}, step.kind === "predict" ? "Examples of the agent’s answers" : "Examples of each kind"), letters),
    legend(shares, step.kind === "distinguish" ? "for the kind" : "for the agent’s answer"),
    h("div", { className: "sheet" }, item, error, h("div", { className: "actions" }, back, button)));

  function show(moved) {
    const id = step.order[at];
    const image = byId.get(id);
    const filled = given[id] === undefined ? {} : { choice: given[id] };
    const cards = step.kind === "distinguish";
    const options = cards ? image.options.map((maps, i) => [h("span", {}, mapList(image, maps, stage, false)), i])
      : step.kind === "agree" ? step.options.map((text, i) => [text, i])
        : [...LETTERS.slice(0, step.groups)].map((letter, i) => [letter, i]);
    const set = h("fieldset", {}, h("legend", {}, QUESTION[step.kind]));
    const row = h("div", { className: cards ? "cards" : "options" });
    options.forEach(([text, i]) => {
      const input = h("input", { type: "radio", name: "choice", value: String(i), id: `choice-${i}` });
      input.checked = filled.choice === i;
      input.addEventListener("change", () => { given[id] = i; error.textContent = ""; record("choose", { image: id, value: i }); });
      row.append(h("label", { className: "option" }, h("span", {}, input, cards ? `Kind ${LETTERS[i]}` : text), cards ? text : null));
    });
    set.append(row);
    item.replaceChildren(
      h("p", { className: "part" }, `Image ${at + 1} of ${step.order.length}`),
      h("div", { className: "item" }, picture(image, null, `Image ${at + 1}`), h("div", {},
        step.kind === "agree" ? h("p", {}, "The agent says: ", h("b", {}, `kind ${LETTERS[image.says]}`)) : null,
        step.kind === "agree" && image.maps.length ? [legend(image.maps), mapList(image, image.maps, stage, false)] : null,
        set)));
    if (moved) main.querySelector(".sheet").scrollIntoView({ block: "nearest" });
    back.disabled = at === 0;
    button.textContent = at + 1 < step.order.length ? "Next" : "Done";
    error.textContent = "";
  }
  show(false);
}

const SCREENS = { consent, background, practice: sort, sort, agree: choices, distinguish: choices, predict: choices, intro, confidence, final };

start();
