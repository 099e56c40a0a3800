// The size of a request: one near the model's own, a resolution with a ratio, or a width and a height.

import { byId } from "./dom.js";

const NAMED = "named", CUSTOM = "custom";
let model = {};
let near = []; // sizes that the model makes without rounding

/** The fields of the request. */
export function fields() {
  const chosen = byId("size").value;
  if (chosen === NAMED) return { resolution: byId("resolution").value, aspect_ratio: byId("aspect_ratio").value };
  return { size: chosen === CUSTOM ? `${byId("width").value}x${byId("height").value}` : chosen };
}

const option = (size) => new Option(size.replace("x", " x "), size);

/** Offers the known sizes and `wanted` ("WxH"), which is chosen; without it, the default of the model. */
export function show(wanted = model.defaults?.size) {
  const known = [...new Set([model.defaults?.size, ...near, wanted].filter(Boolean))];
  const named = model.resolutions?.length ? [new Option("Resolution and ratio ...", NAMED)] : [];
  byId("size").replaceChildren(...known.map(option), ...named, new Option("Other ...", CUSTOM));
  byId("size").value = wanted ?? CUSTOM;
  if (wanted) [byId("width").value, byId("height").value] = wanted.split("x");
  showFields();
}

/** Offers the sizes that a plan found near the chosen one. */
export function offer(sizes) {
  if ([NAMED, CUSTOM].includes(byId("size").value)) return;
  near = sizes;
  show(byId("size").value);
}

/** Shows the fields that belong to the choice. */
export function showFields() {
  const chosen = byId("size").value;
  for (const field of document.querySelectorAll(".custom-size")) field.hidden = chosen !== CUSTOM;
  for (const field of document.querySelectorAll(".named-size")) field.hidden = chosen !== NAMED;
}

/** "9:16" as people see it: ratios are height to width. */
function shape(ratio) {
  const [height, width] = ratio.split(":").map(Number);
  return `${width}:${height}${width > height ? " wide" : width < height ? " tall" : ""}`;
}

/** Takes the sizes of another model. */
export function showModel(shown) {
  [model, near] = [shown, []];
  const { resolutions = [], aspect_ratios: ratios = [], defaults = {} } = model;
  byId("resolution").replaceChildren(...resolutions.map((one) => new Option(one, one)));
  byId("aspect_ratio").replaceChildren(...ratios.map((one) => new Option(shape(one), one)));
  if (resolutions.length) [byId("resolution").value, byId("aspect_ratio").value] = [defaults.resolution, defaults.aspect_ratio];
  show();
}
