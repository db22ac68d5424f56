// Imports of the adapter store with their progress, and a form that starts one.
import { call } from "./api.js";
import { bytes, element, seconds, setText } from "./format.js";

const STAGES = { pending: "waits its turn", fetching: "fetching", validating: "checking", storing: "storing", done: "done" };
const ORDER = ["pending", "fetching", "validating", "storing", "done"];

export class Imports {
  constructor(onDone) {
    this.list = document.getElementById("imports");
    this.empty = document.getElementById("imports-empty");
    this.result = document.getElementById("import-result");
    this.name = document.getElementById("import-name");
    this.source = document.getElementById("import-source");
    this.button = document.getElementById("import-run");
    this.onDone = onDone;
    this.items = new Map();
    document.getElementById("import-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#start();
    });
  }

  update({ imports, error }) {
    const known = new Set(imports.map((each) => each.operation));
    for (const [operation, item] of this.items) {
      if (known.has(operation)) continue;
      item.root.remove();
      this.items.delete(operation);
    }
    imports.forEach((each, place) => {
      let item = this.items.get(each.operation);
      if (!item) {
        item = made();
        this.items.set(each.operation, item);
      }
      if (this.list.children[place] !== item.root) this.list.insertBefore(item.root, this.list.children[place] || null);
      fill(item, each);
    });
    this.empty.hidden = imports.length > 0;
    setText(this.empty, error ? `The adapter store does not tell: ${error}` : "None.");
  }

  // Forgets what was shown to another key.
  clear() {
    this.update({ imports: [], error: "" });
    setText(this.result, "");
  }

  async #start() {
    this.button.disabled = true;
    this.result.dataset.state = "";
    setText(this.result, `Importing ${this.name.value}`);
    try {
      const body = { lora_name: this.name.value.trim(), lora_path: this.source.value.trim() };
      setText(this.result, await (await call("v1/load_lora_adapter", { body })).text());
      this.onDone();
    } catch (error) {
      this.result.dataset.state = "failed";
      setText(this.result, error.message);
    }
    this.button.disabled = false;
  }
}

function made() {
  const name = element("b");
  const stage = element("span", { className: "stage" });
  const bar = element("progress", { max: 1 });
  const note = element("p", { className: "note" });
  return { root: element("li", {}, name, stage, bar, note), name, stage, bar, note };
}

function fill(item, told) {
  const state = told.error ? "failed" : told.stage;
  item.root.dataset.state = state;
  setText(item.name, told.name);
  setText(item.stage, told.error ? "failed" : STAGES[told.stage] || told.stage);
  item.bar.setAttribute("aria-label", `Import of ${told.name}`);
  const within = told.stage === "fetching" && told.bytes_total ? told.bytes_done / told.bytes_total : 0;
  item.bar.value = told.error ? 1 : (Math.max(0, ORDER.indexOf(told.stage)) + within) / (ORDER.length - 1);
  const size = told.bytes_total ? `${bytes(told.bytes_done)} of ${bytes(told.bytes_total)}` : told.bytes_done ? bytes(told.bytes_done) : "";
  const age = told.created_at ? `${seconds(Math.max(0, Date.now() / 1000 - told.created_at))} ago` : "";
  setText(item.note, told.error || [size, age].filter(Boolean).join(" \u00b7 "));
}
