// Given pictures and videos: places that take a file by drop or by choice.

import * as api from "./api.js";
import { byId, h } from "./dom.js";

const PLACES = [
  { name: "image", label: "First picture", accept: "image/*" },
  { name: "last_frame", label: "Last picture", accept: "image/*" },
  { name: "extend", label: "Video to extend", accept: "video/*", number: { name: "keep", label: "Frames to keep", value: 17, min: 1, step: 1 } },
  { name: "edit", label: "Video to edit", accept: "video/*", number: { name: "strength", label: "Strength", value: 0.5, min: 0, max: 1, step: 0.05 } },
];
const CONFLICTS = { edit: ["image", "last_frame", "extend"], extend: ["edit", "image"], image: ["edit", "extend"], last_frame: ["edit"] };

const uploads = new Map(); // name of the place -> {id, ready}: the upload's id, and a promise of it
let changed = () => {};

/** The fields of the chosen files: ids of uploads and results, and the numbers that go with them. */
export function fields() {
  const found = {};
  for (const { name, number } of PLACES) {
    const upload = uploads.get(name);
    if (!upload?.id) continue;
    found[name] = upload.id;
    if (number) found[number.name] = number.name === "keep" ? byId("keep").value : Number(byId(number.name).value);
  }
  return found;
}

/** Waits until all chosen files are uploaded. */
export const ready = () => Promise.all([...uploads.values()].map((upload) => upload.ready));

/** Takes all files away. */
export function clear() {
  for (const place of PLACES) choose(place, null);
}

/** Gives a file or result that is on the server. */
export function give(name, id, told) {
  const place = PLACES.find((one) => one.name === name);
  choose(place, null);
  for (const other of CONFLICTS[name]) choose(PLACES.find((one) => one.name === other), null);
  uploads.set(name, { id, ready: Promise.resolve() });
  byId(`drop-${name}`).querySelector(".shown").append(h("p", {}, told), removal(place, "it"));
  showNumber(place, true);
  changed();
}

/** Gives the media of a job again. */
export function fill(media, settings) {
  clear();
  for (const { name, number } of PLACES) {
    const [id] = media[name] ?? [];
    if (id) give(name, id, "As before");
    if (id && number && settings[number.name] !== undefined) byId(number.name).value = settings[number.name];
  }
}

function removal(place, name) {
  return h("button", { type: "button", onclick: () => { choose(place, null); byId(place.name).focus(); } }, `Remove ${name}`);
}

function showNumber(place, shown) {
  if (place.number) byId(place.number.name).closest(".field").hidden = !shown;
}

async function send(place, file, upload) {
  const error = byId(`${place.name}-error`);
  try {
    upload.id = (await api.upload(file, upload.stop.signal)).id;
    changed();
  } catch (problem) {
    if (problem.name === "AbortError") return;
    choose(place, null);
    error.textContent = problem.message;
  }
}

function choose(place, file) {
  const box = byId(`drop-${place.name}`);
  const shown = box.querySelector(".shown");
  for (const old of shown.querySelectorAll("img, video")) URL.revokeObjectURL(old.src);
  shown.replaceChildren();
  byId(`${place.name}-error`).textContent = "";
  uploads.get(place.name)?.stop?.abort();
  if (!file) {
    uploads.delete(place.name);
    byId(place.name).value = "";
  } else {
    for (const other of CONFLICTS[place.name]) choose(PLACES.find((one) => one.name === other), null);
    const upload = { id: null, stop: new AbortController() };
    uploads.set(place.name, upload);
    upload.ready = send(place, file, upload);
    const url = URL.createObjectURL(file);
    shown.append(
      file.type.startsWith("video/")
        ? h("video", { src: url, muted: true, loop: true, autoplay: true, playsInline: true, "aria-label": file.name })
        : h("img", { src: url, alt: file.name }),
      removal(place, file.name),
    );
  }
  showNumber(place, Boolean(file));
  changed();
}

function box(place) {
  const { number } = place;
  const element = h("div", { className: "drop small", id: `drop-${place.name}` },
    h("label", { htmlFor: place.name }, place.label),
    h("input", { type: "file", id: place.name, accept: place.accept, "aria-describedby": `${place.name}-error`,
      onchange: (event) => choose(place, event.target.files[0] ?? null) }),
    h("div", { className: "shown" }),
    number && h("div", { className: "field", hidden: true },
      h("label", { htmlFor: number.name }, number.label),
      h("input", { type: "number", id: number.name, value: number.value, min: number.min, max: number.max, step: number.step, oninput: () => changed() })),
    h("p", { className: "error", id: `${place.name}-error` }));
  for (const type of ["dragenter", "dragover"]) {
    element.addEventListener(type, (event) => { event.preventDefault(); element.classList.add("over"); });
  }
  element.addEventListener("dragleave", () => element.classList.remove("over"));
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    element.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) choose(place, file);
  });
  return element;
}

/** Builds the places; `onChange` is called when a file or a number changes. */
export function build(onChange) {
  byId("drops").append(...PLACES.map(box));
  changed = onChange;
  for (const type of ["dragover", "drop"]) window.addEventListener(type, (event) => event.preventDefault());
}
