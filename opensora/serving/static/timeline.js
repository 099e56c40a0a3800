// What a request keeps, edits and generates, by latent frame, as the server plans it.

import { byId, h } from "./dom.js";

/** [{kind, count}]: neighbours of one kind and reference together. */
function segments(clip) {
  const found = [];
  for (const { kind, reference } of clip) {
    const last = found.at(-1);
    if (last?.kind === kind && last.reference === reference) last.count += 1;
    else found.push({ kind, reference, count: 1 });
  }
  return found;
}

/** Draws the clips of a plan one after the other; each takes its share of `frames`. */
export function draw(timeline, frames) {
  const total = timeline.reduce((sum, clip) => sum + clip.length, 0) || 1;
  const place = byId("timeline");
  const told = [];
  place.replaceChildren();
  timeline.forEach((clip, number) => {
    const words = segments(clip).map(({ kind, count }, position) => {
      const share = Math.max(Math.round((count / total) * frames), 1);
      const shown = h("span", { className: `${kind}${number && !position ? " next" : ""}`, title: `about ${share} frames ${kind}` }, kind);
      shown.style.flex = `${count} 1 0`;
      place.append(shown);
      return `about ${share} frames ${kind}`;
    });
    told.push(`Clip ${number + 1}: ${words.join(", ")}`);
  });
  place.setAttribute("aria-label", told.join(". ") || "No plan yet");
}
