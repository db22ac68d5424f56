// Follows the gateway's events and shows them; the parts of the page are in the modules beside this one.
import { ApiError, call, events, key, pause } from "./api.js";
import { onThemeChange } from "./colors.js";
import { EngineCards, LABELS, SHOWN } from "./engines.js";
import { Fleet, OWNERS } from "./fleet.js";
import { count, element, rate, setText } from "./format.js";
import { Imports } from "./imports.js";
import { KeyDialog } from "./key.js";
import { Playground } from "./playground.js";
import { Spotlight } from "./spotlight.js";
import { AdapterTable, RequestTable } from "./tables.js";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 5000;
const FRAME_MS = 250;
const SHARE = 9; // what it takes to show a reading is a tenth of the time at most
const SILENCE_MS = 10000;
const LINE_POINTS = 60;
const UNHEARD_S = 5;
const HINT = "Point at a page, or reach a map by Tab and move with the arrow keys.";

const node = (id) => document.getElementById(id);
const fleet = new Fleet();
const lines = { rate: [], used: [] };
const spotlight = new Spotlight(redraw);
const cards = new EngineCards(node("engines"), fleet, spotlight, (text) => setText(node("detail"), text || HINT));
const playground = new Playground();
const adapters = new AdapterTable(fleet, spotlight, (name) => playground.choose(name));
const requests = new RequestTable(fleet, (engine, owner, holder) => cards.show(engine, owner, holder));
const imports = new Imports(() => playground.loadModels());
const keys = new KeyDialog();

const legend = Object.fromEntries(
  SHOWN.map((name) => {
    const value = element("b", {}, "0");
    node("legend").append(element("li", {}, element("i", { className: `swatch ${name}` }), `${LABELS[name]} `, value));
    return [name, value];
  }),
);

function state(name, text) {
  node("status").dataset.state = name;
  setText(node("status"), text);
  document.body.dataset.state = name;
}

function notice(text) {
  node("notice").hidden = !text;
  setText(node("notice"), text);
}

let asking = new AbortController();
async function follow() {
  let wait = FIRST_PAUSE_MS;
  while (true) {
    if (document.hidden) await shown();
    try {
      asking = new AbortController();
      const response = await call("ui/events", { signal: asking.signal, silenceMs: SILENCE_MS });
      wait = FIRST_PAUSE_MS;
      notice("");
      state("live", "Live");
      const began = performance.now() / 1000;
      for await (const told of events(response)) {
        take(told);
        if (performance.now() / 1000 - began > UNHEARD_S) fleet.forgetUnheard(began);
      }
      state("lost", "Reconnecting");
    } catch (error) {
      await refusedOrLost(error);
    }
    await Promise.race([pause(wait), keys.changed()]);
    asking.abort(); // whatever is left of the last one
    wait = Math.min(wait * 2, LONGEST_PAUSE_MS);
  }
}

// Returns once it makes sense to ask again.
async function refusedOrLost(error) {
  const status = error instanceof ApiError ? error.status : 0;
  if (status !== 401 && status !== 403) {
    state("lost", "Reconnecting");
    return;
  }
  state("refused", status === 401 ? "Key needed" : "Not shown to this key");
  forget();
  if (status === 401) playground.forget();
  if (status === 401) keys.ask(key.get() ? error.message : "");
  else notice(`${error.message}. The playground works with a key that may generate.`);
  await keys.changed();
}

// Shows nothing any more of what was shown to a key that is changed or taken away.
function forget() {
  fleet.clear();
  imports.clear();
  setText(node("about"), "");
  node("imports-panel").hidden = true;
  schedule();
}

function shown() {
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

function take({ event, data }) {
  const told = JSON.parse(data);
  if (event === "engine") {
    if (fleet.apply(told)) playground.loadModels();
  } else if (event === "imports") imports.update(told);
  else if (event === "gateway") {
    setText(node("about"), [`loraplex ${told.version}`, told.caller].filter(Boolean).join(" \u00b7 "));
    node("imports-panel").hidden = !told.has_store;
    playground.loadModels();
  }
  schedule();
}

let isScheduled = false;
function schedule() {
  if (isScheduled) return;
  isScheduled = true;
  setTimeout(() => requestAnimationFrame(show), Math.max(FRAME_MS, SHARE * lastTook));
}

let lastTook = 0;
function show() {
  const began = performance.now();
  isScheduled = false;
  write();
  lastTook = performance.now() - began;
}

let isRedrawing = false;
function redraw() {
  if (isRedrawing) return;
  isRedrawing = true;
  requestAnimationFrame(() => {
    isRedrawing = false;
    cards.draw();
  });
}

function write() {
  const onDevices = fleet.adapters();
  const engines = [...fleet.engines.values()];
  const sum = (value) => engines.reduce((total, engine) => total + value(engine), 0);
  const counts = [0, 0, 0, 0, 0];
  for (const engine of engines) engine.counts().forEach((pages, owner) => (counts[owner] += pages));
  for (const name of SHOWN) setText(legend[name], count(counts[OWNERS.indexOf(name)]));
  const pages = counts.reduce((total, each) => total + each, 0);
  const used = pages ? (100 * (pages - counts[0] - counts[4])) / pages : 0;
  const tokens = sum((engine) => engine.load.tokens_per_s);
  setText(node("figure-engines"), count(engines.length));
  setText(node("figure-running"), count(sum((engine) => engine.load.running)));
  setText(node("figure-waiting"), count(sum((engine) => engine.load.waiting)));
  setText(node("figure-adapters"), `${count(onDevices.length)}${fleet.leftOut(1) ? "+" : ""}`);
  setText(node("figure-rate"), rate(tokens));
  setText(node("figure-used"), `${used.toFixed(used < 10 ? 1 : 0)} %`);
  cards.update();
  cards.draw();
  cards.retell();
  adapters.update(onDevices);
  requests.update();
  lines.now = { rate: tokens, used };
}

// A point per second, for the last minute.
function sample() {
  for (const [name, ceiling] of [["rate", 0], ["used", 100]]) {
    const points = lines[name];
    points.push(lines.now?.[name] || 0);
    if (points.length > LINE_POINTS) points.shift();
    const highest = ceiling || Math.max(1, ...points);
    const drawn = points.map((value, index) => `${60 - points.length + index + 1},${(19 - (18 * value) / highest).toFixed(1)}`);
    node(`line-${name}`).firstElementChild.setAttribute("points", drawn.join(" "));
  }
}

// A tab that is not seen asks for nothing: each stream takes one of a browser's six connections to an HTTP/1.1 server.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) asking.abort();
});
onThemeChange(() => cards.draw());
setInterval(sample, 1000);
node("key-button").addEventListener("click", () => keys.ask(""));
keys.onChange(() => {
  asking.abort(); // what another key may see is asked for anew
  notice("");
  forget();
  playground.forget();
  playground.loadModels();
});
playground.loadModels();
follow();
