// What is known of the engines: the events of /ui/events taken in. Owners are numbers as in engine.proto, PageOwner.

export const OWNERS = ["free", "kv", "adapter", "retiring", "cached"];
export const KV = 1;
export const ADAPTER = 2;
const FEWEST_NAMES = 4000;

export class Engine {
  constructor(id, target) {
    this.version = 0; // changes with anything that is told of its pages
    this.id = id;
    this.target = target;
    this.info = {};
    this.load = { running: 0, waiting: 0, queued_tokens: 0, tokens_per_s: 0, draining: false };
    this.passedOver = "";
    this.error = "";
    this.leftOut = [0, 0];
    this.clear(0);
  }

  clear(numPages) {
    this.version += 1;
    this.owners = new Uint8Array(numPages);
    this.holders = new Uint32Array(numPages);
    this.requests = new Map();
    this.adapters = new Map();
  }

  get numPages() {
    return this.owners.length;
  }

  // Pages of each owner, by its number.
  counts() {
    if (this.countedVersion !== this.version) {
      this.counted = [0, 0, 0, 0, 0];
      for (const owner of this.owners) this.counted[owner] += 1;
      this.countedVersion = this.version;
    }
    return this.counted;
  }

  apply(news, now) {
    if (news.error) {
      this.error = news.error.message;
      this.leftOut = [0, 0];
      this.clear(0);
      this.load = { running: 0, waiting: 0, queued_tokens: 0, tokens_per_s: 0, draining: false };
      return;
    }
    this.error = "";
    if (news.info) this.info = news.info;
    if (news.snapshot) this.clear(news.num_pages);
    this.load = news.load;
    this.passedOver = news.passed_over;
    this.leftOut = news.left_out;
    const runs = news.runs;
    if (runs.length || news.adapters.length || news.left.length) this.version += 1;
    for (let at = 0; at < runs.length; at += 4) {
      this.owners.fill(runs[at + 2], runs[at], runs[at] + runs[at + 1]);
      this.holders.fill(runs[at + 3], runs[at], runs[at] + runs[at + 1]);
    }
    this.#applyRequests(news, now);
    for (const holder of news.left) this.adapters.delete(holder);
    for (const adapter of news.adapters) this.adapters.set(adapter.holder, { ...adapter, toldAt: now });
  }

  #applyRequests(news, now) {
    for (const holder of news.ended) this.requests.delete(holder);
    for (const request of news.requests) this.requests.set(request.holder, { ...request, toldAt: now });
    const progress = news.progress;
    for (let at = 0; at < progress.length; at += 4) {
      const known = this.requests.get(progress[at]);
      if (!known) continue;
      [known.computed, known.output, known.pages] = progress.slice(at + 1, at + 4);
    }
  }
}

export class Fleet {
  constructor() {
    this.engines = new Map();
    this.names = new Map();
    this.namesVersion = 0;
    this.heard = new Map();
    this.namesKept = FEWEST_NAMES;
  }

  // Returns whether there is an engine more.
  apply(news) {
    const now = performance.now() / 1000;
    if (news.gone) {
      this.engines.delete(news.engine);
      this.heard.delete(news.engine);
      return false;
    }
    const isNew = !this.engines.has(news.engine);
    if (isNew) this.engines.set(news.engine, new Engine(news.engine, news.target));
    for (const [digest, name] of Object.entries(news.names || {})) {
      if (this.names.get(digest) !== name) this.namesVersion += 1;
      this.names.set(digest, name);
    }
    this.heard.set(news.engine, now);
    this.engines.get(news.engine).apply(news, now);
    if (this.names.size > this.namesKept) this.#forgetNames();
    return isNew;
  }

  clear() {
    this.engines.clear();
    this.names.clear();
    this.heard.clear();
  }

  // Where adapters are pushed all day, each revision has a name: those that no engine holds or runs are dropped now and then.
  #forgetNames() {
    const used = new Set();
    for (const engine of this.engines.values()) {
      for (const held of engine.adapters.values()) used.add(held.digest);
      for (const request of engine.requests.values()) for (const digest of request.adapters) used.add(digest);
    }
    for (const digest of this.names.keys()) if (!used.has(digest)) this.names.delete(digest);
    this.namesKept = Math.max(FEWEST_NAMES, 2 * this.names.size);
  }

  // Drops engines that a gateway, asked anew, has not told of since `since` (seconds).
  forgetUnheard(since) {
    for (const id of this.engines.keys()) {
      if ((this.heard.get(id) || 0) >= since) continue;
      this.engines.delete(id);
      this.heard.delete(id);
    }
  }

  name(digest) {
    return this.names.get(digest) || digest.slice(0, 12);
  }

  sorted() {
    return [...this.engines.values()].sort((one, other) => (one.target < other.target ? -1 : 1));
  }

  // Adapters on devices, all engines together, those asked for most first.
  adapters() {
    const now = performance.now() / 1000;
    const found = new Map();
    for (const engine of this.engines.values()) {
      for (const held of engine.adapters.values()) {
        let entry = found.get(held.digest);
        if (!entry) {
          entry = { digest: held.digest, name: this.name(held.digest), rate: 0, rank: held.rank, pages: 0, leases: 0, engines: 0, pinned: false };
          found.set(held.digest, entry);
        }
        entry.rate += faded(held, now);
        entry.pages += held.pages;
        entry.leases += held.leases;
        entry.engines += 1;
        entry.pinned ||= held.pinned;
      }
    }
    return [...found.values()].sort((one, other) => other.rate - one.rate || (one.name < other.name ? -1 : 1));
  }

  // Open requests, the oldest of each engine first; at most so many.
  requests(most) {
    const now = performance.now() / 1000;
    const found = [];
    for (const engine of this.sorted()) {
      if (found.length >= most) break;
      const holders = [...engine.requests.keys()].sort((one, other) => one - other).slice(0, most - found.length);
      for (const holder of holders) {
        const request = engine.requests.get(holder);
        found.push({ ...request, engine, age: request.age_s + now - request.toldAt });
      }
    }
    return found;
  }

  numRequests() {
    return [...this.engines.values()].reduce((total, engine) => total + engine.requests.size, 0);
  }

  // Requests (0) or adapters (1) that engines count but do not tell of, since there are too many.
  leftOut(which) {
    return [...this.engines.values()].reduce((total, engine) => total + engine.leftOut[which], 0);
  }
}

function faded(held, now) {
  const halves = held.half_life_s > 0 ? (now - held.toldAt) / held.half_life_s : 0;
  return held.rate * 2 ** -halves;
}
