// The page: a form, a queue, drafts and a gallery on one server.

import * as api from "./api.js";
import { byId } from "./dom.js";
import * as form from "./form.js";
import * as jobs from "./jobs.js";

/** Asks for the API key; resolves to it, or to null when the dialog is closed. */
function askForKey() {
  const dialog = byId("key-dialog");
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(byId("key").value.trim() || null), { once: true }));
}

function buildTheme() {
  const button = byId("theme");
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.setAttribute("aria-pressed", String(theme === "dark"));
  };
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  show(localStorage.getItem("opensora-theme") ?? system);
  button.addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("opensora-theme", theme);
    show(theme);
  });
}

/** Says whether the server answers; it may be restarted while the page is open. */
async function watchConnection() {
  const health = await fetch("health").then((answer) => answer.json()).catch(() => null);
  byId("connection").textContent = !health ? "The server does not answer; trying again ..." :
    health.problem ? `Nothing can be computed: ${health.problem}` : "Connected";
  setTimeout(watchConnection, health && !health.problem ? 10_000 : 2_000);
}

api.onMissingKey(askForKey);
buildTheme();
watchConnection();
try {
  await form.build(jobs.add);
  await jobs.build(form);
} catch (error) {
  byId("request-error").textContent = error.message;
}
