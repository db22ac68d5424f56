// A card for each engine: what it is, how it fares, and its map.
import { count, element, rate, setText, short } from "./format.js";
import { OWNERS } from "./fleet.js";
import { PoolMap } from "./map.js";

export const LABELS = { kv: "KV cache", adapter: "adapters", cached: "cached prefixes", retiring: "retiring", free: "free" };
export const SHOWN = ["kv", "adapter", "cached", "retiring", "free"];

export class EngineCards {
  constructor(root, fleet, spotlight, tell) {
    this.root = root;
    this.fleet = fleet;
    this.spotlight = spotlight;
    this.tell = tell;
    this.cards = new Map();
  }

  update() {
    const engines = this.fleet.sorted();
    const known = new Set(engines.map((engine) => engine));
    for (const [id, card] of this.cards) if (!known.has(card.map.engine)) this.#remove(id, card);
    if (engines.length && !this.cards.size) this.root.replaceChildren();
    this.root.dataset.many = engines.length > 6 ? "many" : engines.length > 1 ? "some" : "one";
    const height = engines.length > 6 ? 84 : engines.length > 1 ? 140 : 230;
    for (const engine of engines) {
      const card = this.cards.get(engine.id) || this.#add(engine);
      if (card.frame.dataset.height !== String(height) || card.pages !== engine.numPages) {
        card.frame.dataset.height = String(height);
        card.pages = engine.numPages;
        card.map.layout();
      }
      this.#fill(card, engine);
    }
  }

  draw() {
    for (const card of this.cards.values()) card.map.draw();
  }

  retell() {
    for (const card of this.cards.values()) card.map.retell();
  }

  // Shows the first page of a holder on its engine's map.
  show(engine, owner, holder) {
    return this.cards.get(engine.id)?.map.show(owner, holder) || false;
  }

  #add(engine) {
    const map = new PoolMap(engine, { fleet: this.fleet, spotlight: this.spotlight, tell: this.tell });
    const parts = Object.fromEntries(["name", "model", "state", "load", "counts", "error"].map((name) => [name, element("span", { className: name })]));
    const frame = element("div", { className: "map" }, map.canvas);
    const head = element("div", { className: "engine-head" }, parts.name, parts.model, parts.state, parts.load);
    const card = { map, frame, parts, pages: -1, root: element("article", { className: "engine" }, head, frame, parts.error, parts.counts) };
    this.cards.set(engine.id, card);
    this.root.append(card.root);
    return card;
  }

  #remove(id, card) {
    card.map.close();
    card.root.remove();
    this.cards.delete(id);
    if (!this.cards.size) this.root.replaceChildren(element("p", { className: "empty" }, "No engine has told of its pages yet."));
  }

  #fill(card, engine) {
    const { parts, map } = card;
    const counts = engine.counts();
    const state = engine.error ? "away" : engine.load.draining ? "draining" : engine.passedOver ? "passed over" : "";
    setText(parts.name, engine.target);
    parts.name.title = engine.id;
    setText(parts.model, [engine.info.model, engine.info.backend, engine.info.numerics].filter(Boolean).join(" \u00b7 "));
    setText(parts.state, state);
    parts.state.title = engine.error || engine.passedOver;
    setText(parts.load, `${engine.load.running} running \u00b7 ${engine.load.waiting} waiting \u00b7 ${rate(engine.load.tokens_per_s)} tokens/s`);
    setText(parts.error, short(engine.error, 240));
    const told = SHOWN.map((name) => [name, counts[OWNERS.indexOf(name)]]).filter(([, pages]) => pages);
    setText(parts.counts, engine.error ? "" : told.map(([name, pages]) => `${count(pages)} ${LABELS[name]}`).join(" \u00b7 "));
    map.canvas.setAttribute("aria-label", `Pages of engine ${engine.target}: ${parts.counts.textContent}`);
    card.frame.hidden = Boolean(engine.error);
  }
}
