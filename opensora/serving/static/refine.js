// Prompts rewritten by the language model of the server, where the server has one.

import * as api from "./api.js";
import { announce, byId } from "./dom.js";

/** Shows or hides the button. */
export function offer(offered) {
  byId("refine").hidden = !offered;
  byId("undo-refine").hidden = true;
}

/** Builds the buttons. `boxes()` are the inputs with a text each, `changed` is called after a change, `failed(error)` after a failure. */
export function build(boxes, changed, failed) {
  let before = [];
  const show = (inputs, texts) => {
    inputs.forEach((input, index) => (input.value = texts[index] ?? input.value));
    changed();
  };
  byId("refine").addEventListener("click", async () => {
    const inputs = boxes();
    const texts = inputs.map((input) => input.value);
    const button = byId("refine");
    button.disabled = true;
    button.textContent = "Refining ...";
    try {
      const refined = await Promise.all(texts.map((text) => (text.trim() ? api.refine(text) : text)));
      before = texts;
      show(inputs, refined);
      byId("undo-refine").hidden = false;
      announce("The prompt is refined.");
    } catch (error) {
      failed(error);
    } finally {
      button.disabled = false;
      button.textContent = "Refine prompt";
    }
  });
  byId("undo-refine").addEventListener("click", () => {
    show(boxes(), before);
    byId("undo-refine").hidden = true;
    byId("prompt").focus();
  });
}
