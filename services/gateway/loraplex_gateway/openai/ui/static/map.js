// One engine's pages as a canvas: one cell for each page, neighbours of one holder joined, by pointer and by keyboard.
import { pageColor, pagePixel, shadeOf, theme, variable } from "./colors.js";
import { ADAPTER, KV, OWNERS } from "./fleet.js";
import { Pixels } from "./pixels.js";

const LARGEST = 26;
const SMALLEST = 3;
const PIXELS_UP_TO = 6;
const DIMMED = 0.18;
const NAMED_FROM = 13; // cells so high have the adapter's name in them

let pointed = null; // the map under pointer or cursor, the last one of both

export class PoolMap {
  constructor(engine, { fleet, spotlight, tell }) {
    this.engine = engine;
    this.fleet = fleet;
    this.spotlight = spotlight;
    this.tell = tell;
    this.cursor = -1;
    this.size = { width: 0, height: 0, cell: LARGEST, columns: 1 };
    this.pixels = new Pixels();
    this.drawn = "";
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-roledescription", "page map");
    this.canvas.setAttribute("aria-describedby", "detail");
    this.#listen();
    this.observer = new ResizeObserver(() => this.layout());
    this.observer.observe(this.canvas);
  }

  close() {
    this.observer.disconnect();
    if (pointed === this) this.#leave();
  }

  // Chooses the largest cells with which all pages fit, so that the map's height depends on pages and width alone.
  layout() {
    const width = this.canvas.clientWidth;
    const pages = this.engine.numPages;
    if (!width || !pages) return;
    const most = Number(this.canvas.parentElement.dataset.height) || 200;
    let cell = LARGEST;
    while (cell > SMALLEST && Math.ceil(pages / Math.floor(width / cell)) * cell > most) cell -= 1;
    const columns = Math.max(1, Math.min(pages, Math.floor(width / cell)));
    const height = Math.ceil(pages / columns) * cell;
    const ratio = devicePixelRatio || 1;
    this.size = { width, height, cell, columns };
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.height = `${height}px`;
    this.drawn = ""; // a canvas that gets a size is empty
    this.draw();
  }

  // Draws what is told now, unless that is what is drawn.
  draw() {
    if (!this.engine.numPages) {
      this.cursor = -1;
      return;
    }
    this.cursor = Math.min(this.cursor, this.engine.numPages - 1);
    const cursor = document.activeElement === this.canvas ? this.cursor : -1;
    const drawn = [this.engine.version, this.spotlight.seenBy(this.engine), cursor, theme, this.fleet.namesVersion].join(" ");
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    const context = this.canvas.getContext("2d");
    const ratio = devicePixelRatio || 1;
    const { columns, cell, width, height } = this.size;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (cell <= PIXELS_UP_TO) this.#paint(context, ratio);
    else {
      context.clearRect(0, 0, width, height);
      this.#blocks((...block) => this.#block(context, ...block));
    }
    if (cursor < 0) return;
    context.strokeStyle = variable("--focus");
    context.lineWidth = 2;
    context.strokeRect((cursor % columns) * cell, Math.floor(cursor / columns) * cell, cell, cell);
  }

  // Calls back with each block: neighbours in a row that one holder has, and each free page.
  #blocks(each) {
    const { columns } = this.size;
    const { owners, holders } = this.engine;
    for (let first = 0; first < owners.length; ) {
      const owner = owners[first];
      const holder = holders[first];
      const rowEnd = Math.min(owners.length, (Math.floor(first / columns) + 1) * columns);
      let end = first + 1;
      if (owner) while (end < rowEnd && owners[end] === owner && holders[end] === holder) end += 1;
      each(first, end, owner, holder);
      first = end;
    }
  }

  #paint(context, ratio) {
    const { columns, cell } = this.size;
    const side = cell * ratio;
    this.pixels.begin(context);
    this.#blocks((first, end, owner, holder) => {
      const color = pagePixel(owner, shadeOf(this.engine, owner, holder), this.#alpha(owner, holder));
      const [x, y] = [(first % columns) * side, Math.floor(first / columns) * side];
      this.pixels.fill(x, y, (end - first) * side - ratio, side - ratio, color);
    });
    this.pixels.end(context);
  }

  #alpha(owner, holder) {
    return this.spotlight.dims(this.engine, owner, holder) ? DIMMED : 1;
  }

  #block(context, first, end, owner, holder) {
    const { columns, cell } = this.size;
    const x = (first % columns) * cell;
    const y = Math.floor(first / columns) * cell;
    const width = (end - first) * cell - 2;
    context.globalAlpha = this.#alpha(owner, holder);
    context.fillStyle = pageColor(owner, shadeOf(this.engine, owner, holder));
    context.beginPath();
    context.roundRect(x, y, width, cell - 2, cell > 8 ? 3 : 1);
    context.fill();
    if (owner === ADAPTER && cell >= NAMED_FROM) this.#name(context, holder, x, y, width);
    context.globalAlpha = 1;
  }

  #name(context, holder, x, y, width) {
    const adapter = this.engine.adapters.get(holder);
    if (!adapter) return;
    const { cell } = this.size;
    context.font = `600 ${Math.min(11, cell - 4)}px system-ui, sans-serif`;
    const name = this.fleet.name(adapter.digest);
    if (context.measureText(name).width > width - 8) return;
    context.fillStyle = variable("--on-adapter");
    context.textBaseline = "middle";
    context.fillText(name, x + 4, y + (cell - 1) / 2);
  }

  // Says what a page is and whose.
  describe(page) {
    const { owners, holders, requests, adapters } = this.engine;
    const at = `Page ${page.toLocaleString("en-US")}`;
    const owner = owners[page];
    if (owner === KV) {
      const request = requests.get(holders[page]);
      if (!request) return `${at}: KV cache of a sequence`;
      const names = request.adapters.map((digest) => this.fleet.name(digest)).join(" + ") || "base model";
      return `${at}: KV cache of request ${request.id}, ${names}, ${request.phase}, ${request.pages} pages`;
    }
    if (owner === ADAPTER) {
      const adapter = adapters.get(holders[page]);
      if (!adapter) return `${at}: an adapter's weights`;
      const use = adapter.leases ? `in use by ${adapter.leases}` : "not in use";
      return `${at}: weights of adapter ${this.fleet.name(adapter.digest)}, rank ${adapter.rank}, ${adapter.pages} pages, ${use}`;
    }
    const others = { free: "free", cached: "cached prefix, free when needed", retiring: "retiring: a running step may still read it" };
    return `${at}: ${others[OWNERS[owner]]}`;
  }

  // Puts the cursor on the first page of a holder and the focus on the map.
  show(owner, holder) {
    const found = this.engine.owners.findIndex((each, page) => each === owner && this.engine.holders[page] === holder);
    if (found < 0) return false;
    this.canvas.focus();
    this.#moveTo(found);
    return true;
  }

  // Says anew what the page under pointer or cursor is: it may be another's meanwhile.
  retell() {
    if (pointed === this && this.cursor >= 0) this.#moveTo(this.cursor);
  }

  #moveTo(page) {
    if (!this.engine.numPages) return;
    pointed = this;
    this.cursor = Math.max(0, Math.min(this.engine.numPages - 1, page));
    this.spotlight.on(this.engine, this.engine.owners[this.cursor], this.engine.holders[this.cursor]);
    this.tell(this.describe(this.cursor));
  }

  #listen() {
    const { canvas } = this;
    canvas.addEventListener("pointermove", (event) => {
      const { cell, columns } = this.size;
      const column = Math.min(columns - 1, Math.floor(event.offsetX / cell));
      const page = Math.floor(event.offsetY / cell) * columns + column;
      if (page >= 0 && page < this.engine.numPages) this.#moveTo(page);
    });
    canvas.addEventListener("pointerleave", () => this.#leave());
    canvas.addEventListener("focus", () => this.#moveTo(Math.max(0, this.cursor)));
    canvas.addEventListener("blur", () => this.#leave());
    canvas.addEventListener("keydown", (event) => {
      const { columns } = this.size;
      const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -Infinity, End: Infinity };
      if (event.key in steps) this.#moveTo(this.cursor + steps[event.key]);
      else if (event.key === "Escape") {
        pointed = null;
        this.spotlight.off();
      }
      else return;
      event.preventDefault();
    });
  }

  #leave() {
    if (pointed === this) pointed = null;
    this.spotlight.off();
    this.tell("");
  }
}
