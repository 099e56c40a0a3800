// The request: fields, their cost before sending, and errors where they belong.

import * as api from "./api.js";
import { announce, byId, debounce, h } from "./dom.js";
import * as drops from "./drops.js";
import * as timeline from "./timeline.js";

const SETTINGS = [
  { name: "seed", label: "Seed", type: "number", step: 1 },
  { name: "num_sampling_steps", label: "Steps", type: "number", min: 1, step: 1 },
  { name: "cfg_scale", label: "Guidance", type: "number", min: 0, step: 0.1 },
  { name: "fps", label: "Frame rate", type: "number", min: 1, step: 1 },
  { name: "flow", label: "Motion score", type: "number", min: 0, step: 0.5 },
  { name: "aes", label: "Aesthetic score", type: "number", min: 0, max: 10, step: 0.1 },
  { name: "camera_motion", label: "Camera motion",
    options: ["", "static", "pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out"] },
  { name: "lora", label: "Adapters", type: "text" },
  { name: "negative_prompt", label: "Negative prompt", type: "text" },
];
const CUSTOM = "custom";
const SHARED = 17; // frames at a clip's end that the next clip goes on from
let models = [];
let sizes = []; // that the model makes, near the chosen one

const model = () => models.find((one) => one.id === byId("model").value) ?? models[0];
const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));

function size() {
  if (byId("size").value !== CUSTOM) return byId("size").value;
  return `${byId("width").value}x${byId("height").value}`;
}

/** The prompt, with a text for each loop in the notation of Open-Sora 1.2: |0|text|1|text. */
function promptText() {
  const first = byId("prompt").value.trim();
  const texts = [...byId("loop-texts").querySelectorAll("input")].map((input) => input.value.trim());
  if (!texts.some(Boolean)) return first;
  return `|0|${first}` + texts.map((text, index) => (text ? `|${index + 1}|${text}` : "")).join("");
}

/** The fields of the request as the server takes them; empty ones are left out. */
export function fields() {
  const found = { prompt: promptText(), model: byId("model").value, size: size(), num_frames: number("num_frames"), ...drops.fields() };
  if (number("loop") > 1) found.loop = number("loop");
  for (const { name } of SETTINGS) {
    const input = byId(name);
    const value = input.value.trim();
    if (value) found[name] = input.type === "number" ? Number(value) : value;
  }
  return Object.fromEntries(Object.entries(found).filter(([, value]) => value !== null && value !== ""));
}

/** The texts of the loops of a prompt: |0|text|1|text; a prompt without numbers is the first. */
function loopTexts(prompt) {
  const parts = prompt.split(/\|(\d+)\|/);
  if (parts.length < 3 || parts[0].trim()) return [prompt];
  const texts = [];
  for (let index = 1; index < parts.length; index += 2) texts[Number(parts[index])] = parts[index + 1].trim();
  return texts;
}

/** Fills the form with the settings of a job. */
export function fill(job) {
  const { settings } = job;
  if (models.some((one) => one.id === job.model)) byId("model").value = job.model;
  showModel();
  showSizes(job.size);
  byId("num_frames").value = settings.num_frames ?? byId("num_frames").value;
  byId("loop").value = settings.loop ?? 1;
  showLoops();
  const texts = loopTexts(job.prompt);
  byId("prompt").value = texts[0] ?? "";
  byId("loop-texts").querySelectorAll("input").forEach((input, index) => (input.value = texts[index + 1] ?? ""));
  for (const { name } of SETTINGS) byId(name).value = [settings[name] ?? ""].flat().join(" ");
  drops.fill(job.media, settings);
  update();
  byId("prompt").focus();
}

/** Takes a result as the video that the next request extends or edits. */
export function from(job, how) {
  byId("prompt").value = loopTexts(job.prompt)[0] ?? "";
  showSizes(job.size);
  drops.give(how, job.id, job.prompt);
  if (how === "extend") byId("num_frames").value = 2 * (parseInt(byId("num_frames").value, 10) || 17);
  update();
  byId("prompt").focus();
}

const defaultSize = () => {
  const [height, width] = model()?.defaults?.image_size ?? [];
  return width ? `${width}x${height}` : null;
};

function showSizes(chosen) {
  const wanted = chosen ?? defaultSize() ?? sizes[0];
  const known = [...new Set([defaultSize(), ...sizes, wanted].filter(Boolean))];
  byId("size").replaceChildren(...known.map((one) => new Option(one.replace("x", " x "), one)), new Option("Other ...", CUSTOM));
  byId("size").value = wanted ?? CUSTOM;
  if (wanted) [byId("width").value, byId("height").value] = wanted.split("x");
}

function showModel() {
  const { defaults = {} } = model() ?? {};
  sizes = [];
  showSizes();
  byId("num_frames").value = parseInt(defaults.num_frames, 10) || 17;
  for (const { name } of SETTINGS) {
    if (byId(name).tagName === "INPUT") byId(name).placeholder = defaults[name] ?? "";
  }
  const { adapters = [] } = model() ?? {};
  byId("lora").closest(".field").hidden = adapters.length === 0;
  byId("lora").placeholder = adapters.map((name) => `${name}:0.8`).join(" ");
}

function showLoops() {
  const wanted = Math.min(Math.max(number("loop") ?? 1, 1), 20) - 1;
  if (wanted && number("num_frames") <= SHARED) byId("num_frames").value = 2 * SHARED;
  const box = byId("loop-texts");
  while (box.children.length > wanted) box.lastElementChild.remove();
  while (box.children.length < wanted) {
    const clip = box.children.length + 2;
    const id = `loop-text-${clip}`;
    box.append(h("div", { className: "field" },
      h("label", { htmlFor: id }, `Prompt of clip ${clip}`),
      h("input", { id, type: "text", placeholder: "as before", oninput: update })));
  }
}

/** Shows an error beside the field that caused it, else above the buttons. */
export function showError(error) {
  const id = { first_frame: "image", input_reference: "image", image_size: "size", width: "size", height: "size" }[error.param] ?? error.param;
  const input = id && byId(id);
  const place = (id && byId(`${id}-error`)) || byId("request-error");
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  place.textContent = error.message + wait;
  if (input) {
    input.setAttribute("aria-invalid", "true");
    input.closest("details")?.setAttribute("open", "");
    input.focus();
  }
  announce(error.message);
}

function clearErrors() {
  for (const place of byId("request").querySelectorAll(".error")) place.textContent = "";
  for (const input of byId("request").querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

let planning = null;
const showPlan = debounce(async () => {
  planning?.abort();
  planning = new AbortController();
  const place = byId("plan");
  if (!byId("prompt").value.trim()) return void (place.textContent = "");
  try {
    const plan = await api.plan(fields(), planning.signal);
    place.textContent = summary(plan);
    timeline.draw(plan.timeline, plan.num_frames);
    if (byId("size").value !== CUSTOM) {
      sizes = plan.near_sizes;
      showSizes(byId("size").value);
    }
  } catch (error) {
    if (error.name !== "AbortError") place.textContent = error.message;
  }
}, 600);

const gigabytes = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
const duration = (seconds) => (seconds < 90 ? `${Math.max(Math.round(seconds), 1)} s` : `${Math.round(seconds / 60)} min`);

/** What a request makes and takes, in a sentence or two. */
function summary(plan) {
  const made = plan.num_frames === 1 ? `A picture of ${plan.width} x ${plan.height}` :
    `${plan.video_seconds.toFixed(1)} s of video, ${plan.num_frames} frames of ${plan.width} x ${plan.height}`;
  const takes = plan.seconds ? `about ${duration(plan.seconds)}` : "time not yet known";
  const waits = plan.queue.ahead ? ` after ${plan.queue.ahead} waiting` : "";
  const memory = plan.fits === false ? `${gigabytes(plan.memory_bytes)} of memory, more than is free` : `${gigabytes(plan.memory_bytes)} of memory`;
  return [`${made}: ${takes}${waits}, ${memory}.`, ...plan.notes].join(" ");
}

function update() {
  for (const field of document.querySelectorAll(".custom-size")) field.hidden = byId("size").value !== CUSTOM;
  const frames = number("num_frames") ?? 1;
  const rate = model()?.defaults?.fps;
  byId("length").textContent = frames === 1 ? "A picture." : rate ? `${(frames / rate).toFixed(1)} s at ${rate} frames a second` : "";
  showPlan();
}

async function send(variations, sent) {
  clearErrors();
  if (!byId("prompt").value.trim()) return showError({ param: "prompt", message: "Describe the video first." });
  const buttons = [byId("generate"), byId("drafts")];
  for (const button of buttons) button.disabled = true;
  try {
    await drops.ready();
    for (const one of variations) sent(await api.create({ ...fields(), ...one }));
  } catch (error) {
    showError(error);
  } finally {
    for (const button of buttons) button.disabled = false;
  }
}

/** Four drafts, with four seeds. */
function fourDrafts() {
  const first = Number(byId("seed").value || model()?.defaults?.seed || 42);
  return [0, 1, 2, 3].map((offset) => ({ seed: first + offset, draft: true }));
}

async function showExample() {
  const examples = await (await fetch("prompts.json")).json();
  const list = examples[model()?.id] ?? examples.other;
  byId("prompt").value = list[Math.floor(Math.random() * list.length)];
  update();
}

function setting({ name, label, options, ...properties }) {
  const input = options
    ? h("select", { id: name, "aria-describedby": `${name}-error`, onchange: update }, options.map((one) => new Option(one || "not said", one)))
    : h("input", { id: name, ...properties, "aria-describedby": `${name}-error`, oninput: update });
  return h("div", { className: "field" }, h("label", { htmlFor: name }, label), input, h("p", { className: "error", id: `${name}-error` }));
}

/** Builds the form. `sent(job)` is called for every request that the server has taken. */
export async function build(sent) {
  byId("settings").append(...SETTINGS.map(setting));
  drops.build(update);
  models = await api.models();
  byId("model").replaceChildren(...models.map((one) => new Option(one.id, one.id)));
  showModel();
  byId("model").addEventListener("change", () => { showModel(); update(); });
  byId("loop").addEventListener("input", () => { showLoops(); update(); });
  for (const id of ["prompt", "size", "width", "height", "num_frames"]) byId(id).addEventListener("input", update);
  byId("request").addEventListener("submit", (event) => { event.preventDefault(); send([{}], sent); });
  byId("drafts").addEventListener("click", () => send(fourDrafts(), sent));
  byId("example").addEventListener("click", showExample);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("request").requestSubmit();
  });
  update();
}
