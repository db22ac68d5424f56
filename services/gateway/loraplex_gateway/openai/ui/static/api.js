// Calls of the gateway, with the key of this tab; and server-sent events, which EventSource cannot ask for with a key.

const STORED = "loraplex.key";
const ROOT = new URL("../", import.meta.url); // what is in front of /ui, behind a proxy too
const SILENCE_MS = 10000;

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Whether a header can have it; fetch throws for others, which would look like a lost gateway.
export const isSendable = (value) => /^[\x21-\x7e]*$/.test(value);

export const key = {
  get: () => sessionStorage.getItem(STORED) || "",
  set: (value) => (value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED)),
};

// `silenceMs`: the gateway counts as lost if it has not begun to answer by then; 0 waits for ever.
export async function call(path, { body, signal, silenceMs = 0 } = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const answer = fetch(new URL(path, ROOT), {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
    credentials: "omit",
    cache: "no-store",
  });
  const response = await within(answer, silenceMs);
  if (!response.ok) throw new ApiError(response.status, await reason(response));
  return response;
}

async function reason(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || `${response.status} ${response.statusText}`;
  }
}

// Yields {event, data} of a stream; ends with it, and throws if nothing, not even a comment, has come for a while.
export async function* events(response, silenceMs = SILENCE_MS) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pieces = []; // of an event that has not ended; joined once, since the first one of an engine is large
  let last = "";
  try {
    while (true) {
      const { value, done } = await within(reader.read(), silenceMs);
      if (done) return;
      pieces.push(value);
      // A piece may end between the two line breaks, hence the last character of the one before.
      if (!(last + value).includes("\n\n")) {
        last = value.slice(-1) || last;
        continue;
      }
      const parts = pieces.join("").split("\n\n");
      pieces = [parts.pop()];
      last = pieces[0].slice(-1);
      for (const part of parts) {
        const found = parsed(part);
        if (found) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may be broken already
  }
}

function parsed(part) {
  let event = "message";
  const data = [];
  for (const line of part.split("\n")) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  return data.length ? { event, data: data.join("\n") } : null;
}

export function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

function within(promise, milliseconds) {
  if (!milliseconds) return promise;
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error("the gateway is silent")), milliseconds);
    promise.then(resolve, reject).finally(() => clearTimeout(timer));
  });
}
