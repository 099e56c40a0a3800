// The server's protocol, docs/serving.md.

/** An error that the server answered with; `param` names the field that caused it. */
export class ApiError extends Error {
  constructor(status, error, retryAfter) {
    super(error.message);
    this.status = status;
    this.param = error.param ?? null;
    this.code = error.code ?? null;
    this.retryAfter = retryAfter;
  }
}

let askForKey = async () => null;
let asking = null;

/** Sets the function that asks the user for an API key. */
export function onMissingKey(ask) {
  askForKey = ask;
}

const headers = () => {
  const key = sessionStorage.getItem("opensora-key");
  return key ? { Authorization: `Bearer ${key}` } : {};
};

async function send(method, path, options = {}) {
  const answer = await fetch(path, { method, ...options, headers: { ...headers(), ...options.headers } });
  if (answer.status === 401) {
    asking ??= askForKey().finally(() => (asking = null));
    const key = await asking;
    if (key) {
      sessionStorage.setItem("opensora-key", key);
      return send(method, path, options);
    }
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    const error = body.error ?? { message: `The server answered with status ${answer.status}.` };
    throw new ApiError(answer.status, error, Number(answer.headers.get("retry-after")) || null);
  }
  return answer;
}

const json = async (method, path, body, signal) => {
  const options = body === undefined ? { signal } : {
    signal, body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
  };
  return (await send(method, path, options)).json();
};

const path = (id, action = "") => `v1/videos/${encodeURIComponent(id)}${action}`;

export const models = async () => (await json("GET", "v1/models")).data;
export const plan = (fields, signal) => json("POST", "v1/videos/plan", fields, signal);
export const refine = async (prompt) => (await json("POST", "v1/prompts/refine", { prompt })).prompt;
export const create = (fields) => json("POST", "v1/videos", fields);
export const list = (after, limit) =>
  json("GET", `v1/videos?order=desc&limit=${limit}${after ? `&after=${encodeURIComponent(after)}` : ""}`);
export const remove = (id) => json("DELETE", path(id));
export const cancel = (id) => json("POST", path(id, "/cancel"));
export const continueDraft = (id) => json("POST", path(id, "/continue"));
export const replay = (id) => json("POST", path(id, "/replay"));

/** Uploads an image or video; its `id` can then be given in a request. */
export async function upload(file, signal) {
  const body = new FormData();
  body.append("file", file, file.name);
  return (await send("POST", "v1/files", { body, signal })).json();
}

/** The file of a result as an object URL. `variant` is video, thumbnail or spritesheet. */
export async function content(id, variant = "video") {
  const answer = await send("GET", path(id, `/content?variant=${variant}`));
  return { url: URL.createObjectURL(await answer.blob()), type: answer.headers.get("content-type") ?? "" };
}

/** Yields {event, data} of all jobs until the connection ends. EventSource cannot send a key, so this reads the stream. */
export async function* events(signal) {
  const answer = await send("GET", "v1/videos/events", { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    const blocks = waiting.split("\n\n");
    waiting = blocks.pop();
    for (const block of blocks) {
      const field = (name) =>
        block.split("\n").filter((line) => line.startsWith(`${name}: `)).map((line) => line.slice(name.length + 2)).join("\n");
      if (field("data")) yield { event: field("event"), data: JSON.parse(field("data")) };
    }
  }
}
