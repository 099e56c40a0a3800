// Jobs as cards: the queue with progress and previews, drafts to choose from, and the gallery.

import * as api from "./api.js";
import { asCommand, asPython, asRequest } from "./copies.js";
import { announce, byId, debounce, h } from "./dom.js";
import { readable } from "./prompts.js";

const PAGE = 24;
const MOMENT = 5; // seconds within which jobs count as created together
const NONE = "No videos yet.";
const jobs = new Map(); // id -> {job, card, media}
const listed = []; // ids of the pages that were fetched, newest first
const compared = new Set();
let form = null; // {fill(job), from(job, how)}
let hasOlder = false;

const ended = (job) => job.status === "completed" || job.status === "failed";
const isDraft = (job) => job.status === "completed" && job.draft;
const place = (job) => byId(!ended(job) || job.status === "failed" ? "queue" : isDraft(job) ? "draft-list" : "gallery");
const facts = (job) => [job.model, job.size.replace("x", " x "), job.num_frames > 1 && `${job.num_frames} frames`,
  job.settings.seed !== undefined && `seed ${job.settings.seed}`, job.draft && "draft",
  job.identical === true && "replay, identical", job.identical === false && "replay, not identical"].filter(Boolean).join(", ");

function button(label, work, about) {
  return h("button", { type: "button", "aria-label": about && `${label}: ${about}`, onclick: async (event) => {
    const pressed = event.currentTarget;
    pressed.disabled = true;
    try {
      await work();
    } catch (error) {
      pressed.closest("li")?.querySelector(".error").replaceChildren(error.message);
      announce(error.message);
    } finally {
      pressed.disabled = false;
    }
  } }, label);
}

async function copy(text) {
  await navigator.clipboard.writeText(text);
  announce("Copied.");
}

/** A menu whose choice copies the job in another form. */
function copyMenu(job) {
  const forms = { "Copy as ...": null, Command: asCommand, Python: asPython, Request: asRequest };
  return h("select", { "aria-label": `Copy as: ${job.prompt}`, onchange: async (event) => {
    const make = forms[event.target.value];
    event.target.selectedIndex = 0;
    if (make) await copy(make(job));
  } }, Object.keys(forms).map((name) => new Option(name, name)));
}

/** A video with controls; it plays where `plays` is set and nothing asks for less motion. */
const video = (url, prompt, plays = false) => h("video", { src: url, controls: true, loop: true, muted: true, playsInline: true,
  autoplay: plays && !matchMedia("(prefers-reduced-motion: reduce)").matches, "aria-label": prompt });

async function showMedia(entry) {
  if (entry.media) return;
  entry.media = await api.content(entry.job.id);
  const shown = entry.media.type.startsWith("image/")
    ? h("img", { className: "picture", src: entry.media.url, alt: entry.job.prompt })
    : video(entry.media.url, entry.job.prompt, isDraft(entry.job));
  shown.className = "picture";
  entry.card.querySelector(".picture").replaceWith(shown);
}

async function download(entry) {
  await showMedia(entry);
  const ending = entry.media.type.startsWith("image/") ? "png" : "mp4";
  h("a", { href: entry.media.url, download: `${entry.job.id}.${ending}` }).click();
}

async function forget(entry) {
  await api.remove(entry.job.id);
  drop(entry.job.id);
}

function drop(id) {
  const entry = jobs.get(id);
  if (!entry) return;
  if (entry.media) URL.revokeObjectURL(entry.media.url);
  entry.card.remove();
  jobs.delete(id);
  compared.delete(id);
  if (listed.includes(id)) listed.splice(listed.indexOf(id), 1);
  byId("compare").disabled = compared.size !== 2;
  showEmpty();
}

function actions(entry) {
  const { job } = entry;
  const about = job.prompt;
  if (!ended(job)) return [button("Cancel", () => api.cancel(job.id).then(update), about)];
  const common = [button("Use settings", async () => form.fill(job), about), button("Delete", () => forget(entry), about)];
  if (job.status === "failed") return common;
  if (isDraft(job)) return [button("Continue", async () => add(await api.continueDraft(job.id)), about), ...common];
  return [button("Download", () => download(entry), about), button("Extend", async () => form.from(job, "extend"), about),
    button("Edit", async () => form.from(job, "edit"), about), button("Replay", async () => add(await api.replay(job.id)), about), copyMenu(job), ...common];
}

function compareBox(entry) {
  const { id } = entry.job;
  return h("label", { className: "check" }, h("input", { type: "checkbox", checked: compared.has(id), onchange: (event) => {
    event.target.checked ? compared.add(id) : compared.delete(id);
    entry.card.classList.toggle("chosen", event.target.checked);
    byId("compare").disabled = compared.size !== 2;
  } }), "Compare");
}

function draw(entry) {
  const { job, card } = entry;
  const running = !ended(job);
  const picture = card.querySelector(".picture") ?? h("div", { className: "picture none" }, running ? "No preview yet" : "");
  card.replaceChildren(...[
    picture,
    h("h3", {}, readable(job.prompt)),
    h("p", { className: "facts" }, facts(job)),
    running && h("progress", { max: 100, value: job.progress, "aria-label": `Progress of ${job.prompt}` }),
    running && h("p", { className: "facts state" }, job.status === "queued" ? "Waiting" : `${job.progress} %`),
    h("p", { className: "error" }, job.error?.message ?? ""),
    place(job).id === "gallery" && compareBox(entry),
    h("p", { className: "actions small" }, ...actions(entry)),
  ].filter(Boolean));
  insert(entry);
}

/** Puts a card into its list: the queue in order, the others newest first, and those of one moment by their seeds. */
function insert({ job, card }) {
  const list = place(job);
  card.dataset.id = job.id;
  card.dataset.created = job.created_at;
  card.dataset.seed = job.settings.seed ?? 0;
  card.dataset.text = `${job.prompt} ${job.model} ${job.settings.seed ?? ""}`.toLowerCase();
  if (card.parentElement === list) return;
  const follows = ({ dataset: { created, seed } }) => {
    const age = job.created_at - Number(created);
    return age > MOMENT || (age >= -MOMENT && Number(seed) > Number(card.dataset.seed));
  };
  const before = list.id === "queue" ? null : [...list.children].find(follows);
  list.insertBefore(card, before ?? null);
  showEmpty();
}

function showEmpty() {
  byId("queue-empty").hidden = byId("queue").children.length > 0;
  byId("gallery-empty").hidden = byId("gallery").children.length > 0;
  byId("drafts-section").hidden = byId("draft-list").children.length === 0;
}

function showPreview(entry, url) {
  const shown = h("img", { className: "picture", src: url, alt: `Preview: ${entry.job.prompt}` });
  entry.card.querySelector(".picture").replaceWith(shown);
}

/** Fetches the thumbnail of a card once the card comes into view. */
const views = new IntersectionObserver((changes) => {
  for (const { isIntersecting, target } of changes) {
    if (!isIntersecting) continue;
    views.unobserve(target);
    const image = target.querySelector("img.picture");
    if (image && !image.src) api.content(target.dataset.id, "thumbnail").then(({ url }) => (image.src = url), () => {});
  }
});

function showThumbnail(entry) {
  const { job, card } = entry;
  const image = h("img", { className: "picture", alt: job.num_frames === 1 ? job.prompt : "" });
  const play = () => h("button", { type: "button", "aria-label": `Play: ${job.prompt}`, className: "picture",
    onclick: () => showMedia(entry).then(() => card.querySelector("video")?.play()) }, image);
  card.querySelector(".picture").replaceWith(job.num_frames === 1 ? image : play());
  views.observe(card);
}

/** Shows the new state of a job. */
export function update(job) {
  const entry = jobs.get(job.id);
  if (!entry) return;
  const before = entry.job;
  if (ended(before) && before.status === job.status) return;
  entry.job = job;
  draw(entry);
  if (!ended(before) && ended(job)) {
    announce(job.status === "completed" ? `Finished: ${job.prompt}` : `Failed: ${job.error?.message}`);
  }
  showResult(entry);
}

function showResult(entry) {
  if (entry.job.status !== "completed" || entry.media) return;
  if (isDraft(entry.job)) showMedia(entry).catch(() => {});
  else showThumbnail(entry);
}

/** Follows all jobs on one stream; asks again after a pause when the connection is lost, such as by a restart. */
async function watch() {
  for (;;) {
    try {
      for await (const { event, data } of api.events()) receive(event, data);
    } catch {
      // the header says that the server does not answer
    }
    await new Promise((resume) => setTimeout(resume, 1500));
    await refresh().catch(() => {});
  }
}

function receive(event, data) {
  const entry = jobs.get(data.id);
  if (event === "deleted") drop(data.id);
  else if (event === "status") add(data);
  else if (entry && event === "progress") showProgress(entry, data.progress);
  else if (entry && event === "preview") showPreview(entry, data.image);
}

/** Fetches the newest jobs again: what ended while the connection was lost. */
async function refresh() {
  const page = await api.list(null, PAGE);
  for (const job of page.data) add(job);
}

function showProgress(entry, progress) {
  entry.job = { ...entry.job, status: "in_progress", progress };
  const bar = entry.card.querySelector("progress");
  if (!bar) return;
  bar.value = progress;
  entry.card.querySelector(".state").textContent = `${progress} %`;
}

/** Adds a job to its list. */
export function add(job) {
  if (jobs.has(job.id)) return update(job);
  const entry = { job, card: h("li", {}), media: null };
  jobs.set(job.id, entry);
  draw(entry);
  showResult(entry);
}

async function showPage() {
  const page = await api.list(listed.at(-1), PAGE);
  for (const job of page.data) add(job);
  listed.push(...page.data.map((job) => job.id));
  hasOlder = page.has_more;
  byId("older").hidden = !hasOlder;
}

const setting = ({ job }, name) => String(job.settings[name] ?? "default");

async function compare() {
  const pair = [...compared].map((id) => jobs.get(id));
  await Promise.all(pair.map(showMedia));
  const names = new Set(pair.flatMap(({ job }) => Object.keys(job.settings)));
  const differing = [...names].filter((name) => setting(pair[0], name) !== setting(pair[1], name));
  byId("pair").replaceChildren(...pair.map((entry) => h("figure", {},
    entry.media.type.startsWith("image/")
      ? h("img", { src: entry.media.url, alt: entry.job.prompt })
      : video(entry.media.url, entry.job.prompt),
    h("figcaption", {}, h("p", {}, readable(entry.job.prompt)), h("p", { className: "facts" }, facts(entry.job)),
      ...differing.map((name) => h("p", { className: "facts differs" }, `${name}: ${setting(entry, name)}`))))));
  byId("compare-dialog").showModal();
}

/** Shows the cards with all words; fetches older jobs until a page of cards is found or there are no more. */
async function search() {
  const text = byId("search").value;
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const isFound = (card) => words.every((word) => card.dataset.text.includes(word));
  for (;;) {
    const cards = [...byId("gallery").children];
    for (const card of cards) card.hidden = !isFound(card);
    byId("gallery-empty").hidden = cards.some(isFound);
    byId("gallery-empty").textContent = words.length ? "No video has these words." : NONE;
    if (!words.length || !hasOlder || cards.filter(isFound).length >= PAGE) return;
    await showPage();
    if (byId("search").value !== text) return;
  }
}

/** Shows the newest jobs of the server. `target.fill(job)` and `target.from(job, how)` fill the form. */
export async function build(target) {
  form = target;
  byId("search").addEventListener("input", debounce(() => search().catch((error) => announce(error.message)), 200));
  byId("older").addEventListener("click", () => showPage().catch((error) => announce(error.message)));
  byId("compare").addEventListener("click", compare);
  byId("close-compare").addEventListener("click", () => byId("compare-dialog").close());
  byId("play-both").addEventListener("click", () => {
    for (const video of byId("pair").querySelectorAll("video")) {
      video.currentTime = 0;
      video.play();
    }
  });
  await showPage();
  showEmpty();
  watch();
}
