// Colours of pages. Owners differ in hue (blue, orange, teal: told apart by all kinds of colour vision), holders in shade.
import { ADAPTER, KV } from "./fleet.js";

const SHADES = 6;
const MOST_SHADES = 50000;
const dark = matchMedia("(prefers-color-scheme: dark)");
let style = getComputedStyle(document.documentElement);

export function onThemeChange(redraw) {
  dark.addEventListener("change", () => {
    style = getComputedStyle(document.documentElement);
    cache.clear();
    packs.clear();
    theme += 1;
    redraw();
  });
}

export let theme = 0; // how often the colours have changed
const cache = new Map();
const packs = new Map(); // by alpha, then by owner and shade
const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const shades = new Map();
let nextShade = 0;

export function variable(name) {
  if (!cache.has(name)) cache.set(name, style.getPropertyValue(name).trim());
  return cache.get(name);
}

export function pageColor(owner, shade) {
  if (owner === KV) return variable(`--kv-${shade % SHADES}`);
  if (owner === ADAPTER) return variable(`--adapter-${shade % SHADES}`);
  return variable(["--free", "", "", "--retiring", "--cached"][owner]);
}

// The colour of a page as a canvas keeps it, in one number.
export function pagePixel(owner, shade, alpha) {
  const kinds = packs.get(alpha) || [];
  packs.set(alpha, kinds);
  const kind = owner * SHADES + (shade % SHADES);
  if (kinds[kind] === undefined) {
    pixel.fillStyle = pageColor(owner, shade);
    pixel.fillRect(0, 0, 1, 1);
    const [red, green, blue] = pixel.getImageData(0, 0, 1, 1).data;
    [kinds[kind]] = new Uint32Array(new Uint8Array([red, green, blue, Math.round(255 * alpha)]).buffer);
  }
  return kinds[kind];
}

// Sequences are numbered one by one, so that neighbours in time get different shades; an adapter keeps its shade on all engines.
export function shadeOf(engine, owner, holder) {
  if (owner === KV) return holder;
  const adapter = engine.adapters.get(holder);
  return adapter ? shadeOfDigest(adapter.digest) : 0;
}

// In the order in which they are first seen: the first few differ, which a hash of the digest would not see to.
export function shadeOfDigest(digest) {
  const known = shades.get(digest);
  if (known !== undefined) return known;
  if (shades.size >= MOST_SHADES) shades.delete(shades.keys().next().value); // the first seen
  shades.set(digest, nextShade % SHADES);
  nextShade += 1;
  return shades.get(digest);
}
