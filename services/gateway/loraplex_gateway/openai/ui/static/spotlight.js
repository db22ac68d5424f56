// Which pages stand out while the pointer or the focus is on something: those of one holder, everywhere else is dimmed.
import { ADAPTER } from "./fleet.js";

export class Spotlight {
  constructor(redraw) {
    this.redraw = redraw;
    this.target = null;
  }

  on(engine, owner, holder) {
    if (!holder) return this.off();
    const adapter = owner === ADAPTER ? engine.adapters.get(holder) : null;
    this.#set({ engine, owner, holder, digest: adapter ? adapter.digest : "" });
  }

  onAdapter(digest) {
    this.#set({ engine: null, owner: ADAPTER, holder: 0, digest });
  }

  off() {
    this.#set(null);
  }

  // Whether pages of a holder are dimmed now.
  dims(engine, owner, holder) {
    const lit = this.target;
    if (!lit) return false;
    if (lit.digest) return owner !== ADAPTER || engine.adapters.get(holder)?.digest !== lit.digest;
    return engine !== lit.engine || owner !== lit.owner || holder !== lit.holder;
  }

  // What decides which pages of an engine are dimmed: as long as it is the same, they are.
  seenBy(engine) {
    const lit = this.target;
    if (!lit) return "all";
    if (!lit.digest) return engine === lit.engine ? `${lit.owner} ${lit.holder}` : "none";
    for (const held of engine.adapters.values()) if (held.digest === lit.digest) return lit.digest;
    return "none";
  }

  #set(target) {
    const same = target && this.target && ["engine", "owner", "holder", "digest"].every((part) => target[part] === this.target[part]);
    if (same) return;
    this.target = target;
    this.redraw();
  }
}
