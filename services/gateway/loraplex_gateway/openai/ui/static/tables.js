// Adapters by heat, and requests with their phases; at most so many rows, the others are counted.
import { shadeOfDigest } from "./colors.js";
import { KV } from "./fleet.js";
import { count, element, seconds, setText, short } from "./format.js";

const MOST_ROWS = 50;

class Rows {
  constructor(table, more, make) {
    this.body = table.tBodies[0];
    this.more = more;
    this.make = make;
    this.rows = [];
  }

  // Rows are used again in place, so that focus and hover stay where they are.
  fill(entries, write, what, { total = entries.length, leftOut = 0 } = {}) {
    const shown = entries.slice(0, MOST_ROWS);
    while (this.rows.length < shown.length) {
      const row = this.make();
      this.rows.push(row);
      this.body.append(row.root);
    }
    this.rows.forEach((row, index) => {
      row.root.hidden = index >= shown.length;
      row.entry = shown[index];
      if (row.entry) write(row, row.entry);
    });
    const left = total - shown.length;
    const told = left > 0 ? `and ${count(left)} more ${what}` : entries.length ? "" : `No ${what}.`;
    setText(this.more, [told, leftOut ? `and ${count(leftOut)} that engines only count` : ""].filter(Boolean).join(" "));
  }
}

function cells(...kinds) {
  return kinds.map((kind) => element("td", kind ? { className: kind } : {}));
}

export class AdapterTable {
  constructor(fleet, spotlight, choose) {
    this.fleet = fleet;
    this.filter = document.getElementById("adapter-filter");
    this.filter.addEventListener("input", () => this.update(this.fleet.adapters()));
    this.rows = new Rows(document.getElementById("adapters"), document.getElementById("adapters-more"), () => {
      const parts = cells("", "wide", "number", "number", "number", "number");
      const swatch = element("i", { className: "swatch" });
      const name = element("button", { type: "button", className: "link" });
      const bar = element("meter", { min: 0, max: 1, "aria-hidden": "true" });
      const value = element("span", { className: "value" });
      parts[0].append(swatch, name);
      parts[1].append(bar, value);
      const row = { root: element("tr", {}, ...parts), parts, swatch, name, bar, value };
      const light = () => row.entry && spotlight.onAdapter(row.entry.digest);
      for (const event of ["pointerenter", "focusin"]) row.root.addEventListener(event, light);
      for (const event of ["pointerleave", "focusout"]) row.root.addEventListener(event, () => spotlight.off());
      name.addEventListener("click", () => choose(row.entry.name));
      return row;
    });
  }

  update(all) {
    const wanted = this.filter.value.trim().toLowerCase();
    const hottest = Math.max(1e-9, all[0]?.rate || 0);
    this.rows.fill(
      wanted ? all.filter((adapter) => adapter.name.toLowerCase().includes(wanted)) : all,
      (row, adapter) => {
        row.swatch.dataset.shade = String(shadeOfDigest(adapter.digest) % 6);
        setText(row.name, adapter.name + (adapter.pinned ? " (pinned)" : ""));
        row.name.title = `Ask ${adapter.name} in the playground; ${adapter.digest}`;
        row.bar.value = adapter.rate / hottest;
        setText(row.value, (adapter.rate * 60).toFixed(1));
        [adapter.rank, adapter.pages, adapter.leases, adapter.engines].forEach((number, index) => setText(row.parts[index + 2], count(number)));
      },
      "adapters on devices",
      { leftOut: this.fleet.leftOut(1) },
    );
  }
}

export class RequestTable {
  constructor(fleet, show) {
    this.fleet = fleet;
    this.rows = new Rows(document.getElementById("requests"), document.getElementById("requests-more"), () => {
      const parts = cells("", "name", "", "number", "number", "number", "number");
      const id = element("button", { type: "button", className: "link mono" });
      const phase = element("span", { className: "phase" });
      parts[0].append(id);
      parts[2].append(phase);
      const row = { root: element("tr", {}, ...parts), parts, id, phase };
      id.addEventListener("click", () => show(row.entry.engine, KV, row.entry.holder));
      return row;
    });
  }

  update() {
    this.rows.fill(
      this.fleet.requests(MOST_ROWS),
      (row, request) => {
        setText(row.id, short(request.id, 10));
        row.id.title = `Show the pages of ${request.id} (${request.whose || "no tenant"})`;
        setText(row.parts[1], request.adapters.map((digest) => this.fleet.name(digest)).join(" + ") || "base model");
        setText(row.phase, request.phase);
        row.phase.dataset.phase = request.phase;
        const isPartly = request.phase === "prefill" && request.computed < request.prompt;
        setText(row.parts[3], isPartly ? `${count(request.computed)} / ${count(request.prompt)}` : count(request.prompt));
        setText(row.parts[4], count(request.output));
        setText(row.parts[5], count(request.pages));
        setText(row.parts[6], seconds(request.age));
      },
      "requests under way",
      { total: this.fleet.numRequests(), leftOut: this.fleet.leftOut(0) },
    );
  }
}
