// The request: fields, their cost before sending, and errors where they belong.

import * as api from "./api.js";
import { announce, byId, debounce, h } from "./dom.js";
import * as drops from "./drops.js";
import { promptOf, textsOf } from "./prompts.js";
import * as refine from "./refine.js";
import * as sizes from "./sizes.js";
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
const SHARED = 17; // frames at a clip's end that the next clip goes on from
let models = [];

const model = () => models.find((one) => one.id === byId("model").value) ?? models[0];
const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));

/** The inputs with the texts of the clips. */
const texts = () => [byId("prompt"), ...byId("loop-texts").querySelectorAll("input")];

/** The fields of the request as the server takes them; empty ones are left out. */
export function fields() {
  const found = { prompt: promptOf(texts().map((input) => input.value.trim())), model: byId("model").value, ...sizes.fields(), num_frames: number("num_frames"), ...drops.fields() };
  if (number("loop") > 1) found.loop = number("loop");
  for (const { name } of SETTINGS) {
    const input = byId(name);
    const value = input.value.trim();
    if (value) found[name] = input.type === "number" ? Number(value) : value;
  }
  return Object.fromEntries(Object.entries(found).filter(([, value]) => value !== null && value !== ""));
}

/** Fills the form with the settings of a job. */
export function fill(job) {
  const { settings } = job;
  if (models.some((one) => one.id === job.model)) byId("model").value = job.model;
  showModel();
  sizes.show(job.size);
  byId("num_frames").value = settings.num_frames ?? byId("num_frames").value;
  byId("loop").value = settings.loop ?? 1;
  showLoops();
  const given = textsOf(job.prompt);
  texts().forEach((input, index) => (input.value = given[index] ?? ""));
  for (const { name } of SETTINGS) byId(name).value = [settings[name] ?? ""].flat().join(" ");
  drops.fill(job.media, settings);
  update();
  byId("prompt").focus();
}

/** Takes a result as the video that the next request extends or edits. */
export function from(job, how) {
  byId("prompt").value = textsOf(job.prompt)[0] ?? "";
  sizes.show(job.size);
  drops.give(how, job.id, job.prompt);
  if (how === "extend") byId("num_frames").value = 2 * (parseInt(byId("num_frames").value, 10) || 17);
  update();
  byId("prompt").focus();
}

function showModel() {
  const { defaults = {} } = model() ?? {};
  sizes.showModel(model() ?? {});
  byId("num_frames").value = defaults.num_frames ?? 17;
  for (const { name } of SETTINGS) {
    if (byId(name).tagName === "INPUT") byId(name).placeholder = defaults[name] ?? "";
  }
  const { adapters = [], refines_prompts: refines } = model() ?? {};
  refine.offer(refines);
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
    place.replaceChildren(summary(plan), ...notes(plan));
    timeline.draw(plan.timeline, plan.num_frames);
    sizes.offer(plan.near_sizes);
  } catch (error) {
    if (error.name !== "AbortError") place.textContent = error.message;
  }
}, 600);

const gigabytes = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;

function duration(seconds) {
  if (seconds < 90) return `${Math.max(Math.round(seconds), 1)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

const notes = (plan) => (plan.notes.length ? [h("ul", {}, plan.notes.map((note) => h("li", {}, note)))] : []);

/** What a request makes and takes, in a sentence. */
function summary(plan) {
  const made = plan.num_frames === 1 ? `A picture of ${plan.width} x ${plan.height}` :
    `${plan.video_seconds.toFixed(1)} s of video, ${plan.num_frames} frames of ${plan.width} x ${plan.height}`;
  const takes = plan.seconds ? `about ${duration(plan.seconds)}` : "time not yet known";
  const waits = plan.queue.ahead ? ` after ${plan.queue.ahead} waiting` : "";
  const memory = plan.fits === false ? `${gigabytes(plan.memory_bytes)} of memory, more than is free` : `${gigabytes(plan.memory_bytes)} of memory`;
  return `${made}: ${takes}${waits}, ${memory}.`;
}

function update() {
  sizes.showFields();
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
  for (const id of ["prompt", "size", "resolution", "aspect_ratio", "width", "height", "num_frames"]) byId(id).addEventListener("input", update);
  byId("request").addEventListener("submit", (event) => { event.preventDefault(); send([{}], sent); });
  byId("drafts").addEventListener("click", () => send(fourDrafts(), sent));
  refine.build(texts, update, (error) => showError({ ...error, message: error.message, param: "prompt" }));
  byId("example").addEventListener("click", showExample);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("request").requestSubmit();
  });
  update();
}
