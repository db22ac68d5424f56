// One prompt through several adapters side by side: a streamed request of the OpenAI API for each.
import { ApiError, call, events, key, pause } from "./api.js";
import { count, element, rate, seconds, setText } from "./format.js";

const MOST_COLUMNS = 8;
const FIRST_CHOICES = 3;
const MOST_SUGGESTIONS = 50;
const PAGE = 1000;
const OLD_MS = 10000;
const REST_MS = 1000;

export class Playground {
  constructor() {
    for (const id of ["prompt", "adapter", "models", "chosen", "mode", "temperature", "max-tokens", "stop", "run", "answers", "note"]) {
      this[id] = document.getElementById(id);
    }
    this.names = [];
    this.picked = [];
    this.running = null;
    this.hasChosen = false;
    this.loading = null;
    this.form = document.getElementById("playground");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#runAll();
    });
    document.getElementById("add").addEventListener("click", () => this.#addTyped());
    this.stop.addEventListener("click", () => this.running?.abort());
    this.adapter.addEventListener("input", () => this.#suggest());
    this.adapter.addEventListener("focus", () => {
      if (performance.now() - this.loadedAt > OLD_MS) this.loadModels();
    });
    this.adapter.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      this.#addTyped();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit(); // with the fields' checks
    });
  }

  // Reads all names. However often that is asked for (each engine that comes does), a key's are read once a second at most.
  async loadModels() {
    this.isStale = true;
    while (this.isStale && !this.loading) {
      this.isStale = false;
      const asKey = key.get();
      this.loading = this.#load();
      await this.loading;
      if (asKey === key.get()) await Promise.race([pause(REST_MS), new Promise((resolve) => (this.wake = resolve))]);
      this.loading = null;
    }
  }

  // Forgets what was shown to another key, whose names are read without a rest.
  forget() {
    this.wake?.();
    this.names = [];
    this.#suggest();
    if (!this.hasChosen) this.picked = [];
    this.#showChosen();
  }

  // Page by page: a gateway may know ten thousand.
  async #load() {
    const names = [];
    const asKey = key.get();
    this.loadedAt = performance.now();
    try {
      for (let after = ""; ; ) {
        const query = `v1/models?limit=${PAGE}${after && `&after=${encodeURIComponent(after)}`}`;
        const page = await (await call(query, { silenceMs: OLD_MS })).json();
        names.push(...page.data);
        if (!page.has_more || asKey !== key.get()) break;
        after = page.last_id;
      }
    } catch (error) {
      this.adapter.placeholder = error instanceof ApiError ? error.message : "The gateway cannot be reached";
      return;
    }
    if (asKey !== key.get()) return; // another key's names are asked for next
    this.adapter.placeholder = `One of ${count(names.length)} names`;
    this.names = names.map((model) => model.id);
    this.#suggest();
    if (this.hasChosen) return;
    const adapters = names.filter((model) => model.parent && !model.id.includes(":"));
    this.picked = (adapters.length ? adapters : names).slice(0, FIRST_CHOICES).map((model) => model.id);
    this.#showChosen();
  }

  choose(name) {
    if (!name) return;
    const isFull = this.picked.length >= MOST_COLUMNS;
    const isKnown = this.picked.includes(name);
    setText(this.note, isKnown ? `${name} answers already.` : isFull ? `${name} is left out: at most ${MOST_COLUMNS} answer.` : "");
    if (isKnown || isFull) return;
    this.hasChosen = true;
    this.picked.push(name);
    this.#showChosen();
  }

  #addTyped() {
    this.choose(this.adapter.value.trim());
    this.adapter.value = "";
    this.#suggest();
    this.adapter.focus();
  }

  #suggest() {
    const typed = this.adapter.value.trim().toLowerCase();
    const fitting = this.names.filter((name) => name.toLowerCase().includes(typed)).slice(0, MOST_SUGGESTIONS);
    this.models.replaceChildren(...fitting.map((name) => element("option", { value: name })));
  }

  #showChosen() {
    this.chosen.replaceChildren(
      ...this.picked.map((name) => {
        const remove = element("button", { type: "button", className: "remove", "aria-label": `Remove ${name}` }, "\u00d7");
        remove.addEventListener("click", () => {
          this.hasChosen = true;
          setText(this.note, "");
          this.picked = this.picked.filter((other) => other !== name);
          this.#showChosen();
          this.adapter.focus();
        });
        return element("li", {}, name, remove);
      }),
    );
    if (!this.running) this.run.disabled = !this.picked.length;
  }

  async #runAll() {
    if (this.running) return;
    setText(this.note, this.picked.length ? "" : "Choose an adapter first.");
    if (!this.picked.length) return;
    this.running = new AbortController();
    this.run.disabled = true;
    this.stop.disabled = false;
    const columns = this.picked.map((name) => new Column(name));
    this.answers.replaceChildren(...columns.map((column) => column.root));
    await Promise.all(columns.map((column) => column.stream(this.#request(column.name), this.running.signal)));
    this.running = null;
    this.stop.disabled = true;
    this.run.disabled = !this.picked.length;
  }

  #request(model) {
    const shared = {
      model,
      stream: true,
      stream_options: { include_usage: true },
      temperature: Number(this.temperature.value),
      max_tokens: Number(this["max-tokens"].value),
    };
    const text = this.prompt.value;
    return this.mode.value === "chat"
      ? ["v1/chat/completions", { ...shared, messages: [{ role: "user", content: text }] }]
      : ["v1/completions", { ...shared, prompt: text }];
  }
}

class Column {
  constructor(name) {
    this.name = name;
    this.text = element("pre", { tabindex: 0, "aria-label": `Answer of ${name}` });
    this.facts = element("p", { className: "facts" }, "waiting");
    this.root = element("article", { className: "answer" }, element("h3", {}, name), this.text, this.facts);
  }

  async stream([path, body], signal) {
    const began = performance.now();
    let first = 0;
    this.root.dataset.state = "running";
    try {
      let usage = null;
      let finish = "";
      for await (const { data } of events(await call(path, { body, signal }), 0)) {
        if (data === "[DONE]") break;
        const told = JSON.parse(data);
        if (told.error) throw new Error(told.error.message);
        usage = told.usage || usage;
        const choice = told.choices?.[0];
        const piece = choice?.delta?.content ?? choice?.text ?? "";
        if (piece && !first) first = performance.now();
        if (piece) this.#append(piece);
        finish = choice?.finish_reason || finish;
      }
      this.#done(began, first, usage, finish);
    } catch (error) {
      const isStopped = error.name === "AbortError";
      this.root.dataset.state = isStopped ? "stopped" : "failed";
      setText(this.facts, isStopped ? "stopped" : error.message);
    }
  }

  #append(piece) {
    const isAtEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 24;
    this.text.append(piece);
    if (isAtEnd) this.text.scrollTop = this.text.scrollHeight;
    setText(this.facts, "streaming");
  }

  #done(began, first, usage, finish) {
    this.root.dataset.state = "done";
    const tokens = usage?.completion_tokens || 0;
    const spent = (performance.now() - (first || began)) / 1000;
    const facts = [`${count(tokens)} tokens`];
    if (first) facts.push(`first after ${seconds((first - began) / 1000)}`);
    if (first && tokens > 1) facts.push(`${rate((tokens - 1) / Math.max(spent, 1e-3))} tokens/s`);
    if (finish) facts.push(finish);
    setText(this.facts, facts.join(" \u00b7 "));
  }
}
