// Handles events: an image or a model is chosen, a question is submitted.

import { Pane } from "./answer.js";
import { Api, ApiError } from "./api.js";
import { OverlayView } from "./overlay.js";
import * as settings from "./settings.js";

const at = (id) => document.getElementById(id);

const api = new Api();
const full = new Pane(at("full"));
const skip = new Pane(at("skip"), full);
const view = new OverlayView(at("panels"), at("legend"), at("pointed"));
let image = null;
let running = null;
let lastRun = Promise.resolve();
let choosing = Promise.resolve();

// ------------------------------------------------------------------------------------------ the image

/** Show a file as the image; a question waits until this is done. */
function choose(file) {
  if (file) choosing = load(file);
}

async function load(file) {
  running?.abort();
  await lastRun;
  try {
    const chosen = await dataUrl(file);
    await check(chosen, file.name);
    image = chosen;
  } catch (error) {
    showError(error);
    return;
  }
  showError(null);
  at("stage").classList.add("filled");
  at("another").hidden = false;
  view.clear(image);
  full.clear();
  skip.clear();
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error(`${file.name} cannot be read`)));
    reader.readAsDataURL(file);
  });
}

/** Throw an error if the browser cannot show an image. */
async function check(url, name) {
  const shown = new Image();
  shown.src = url;
  await shown.decode().catch(() => {
    throw new Error(`${name} is not an image that this browser can show: choose a PNG, JPEG or WebP file`);
  });
}

at("file").addEventListener("change", ({ target }) => choose(target.files[0]));
document.addEventListener("paste", (event) => choose(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  at("stage").classList.add("over");
});
document.addEventListener("dragleave", () => at("stage").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("stage").classList.remove("over");
  choose(event.dataTransfer.files[0]);
});

// ------------------------------------------------------------------------------------------ the model

async function listModels() {
  try {
    const models = await api.models();
    const options = models.map(({ id, parent }) => new Option(parent ? `${id} (${parent})` : id, id));
    at("model").replaceChildren(...options);
    // An adapter shows Skip-Vision as it was trained; the base model may not.
    at("model").value = (models.find(({ parent }) => parent) ?? models[0]).id;
    settings.offer(await api.methods());
    showError(null);
    await showModel();
  } catch (error) {
    at("key-field").hidden = at("key-field").hidden && error.status !== 401;
    showError(error);
  }
}

/** Show the model's SkipConfig. With `keepEdits`, fields that the user has changed stay. */
async function showModel(keepEdits = false) {
  const name = at("model").value;
  const card = await api.model(name);
  if (name === at("model").value) settings.show(card, keepEdits);
}

at("model").addEventListener("change", () => showModel().catch(showError));
function useKey() {
  const key = at("key").value.trim();
  if (key === api.key) return;
  api.key = key;
  listModels();
}

at("key").addEventListener("change", useKey);
at("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // use the key; do not submit the question
  useKey();
});
for (const name of ["retained", "skipped"]) at(name).addEventListener("input", settings.explain);
// Show an invalid field even if its section is closed.
at("skipping").addEventListener("invalid", () => (at("skipping").open = true), true);

// --------------------------------------------------------------------------------------- the question

/** A request's body as JSON text, without its SkipConfig and last brace. */
function question() {
  const part = { type: "image_url", image_url: { url: image } };
  const request = {
    model: at("model").value,
    messages: [{ role: "user", content: [part, { type: "text", text: at("question").value }] }],
    temperature: 0,
    max_completion_tokens: Number(at("max-tokens").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  return JSON.stringify(request).slice(0, -1);
}

async function answerTwice() {
  await choosing;
  if (!image) throw new Error("There is no image yet: choose one, drop it, or paste it.");
  const request = question();
  const name = at("model").value;
  let chosen = settings.asJson();
  const { signal } = running;
  view.clear(image);
  full.clear();
  skip.clear();
  skip.root.dataset.state = "waiting";
  await full.show(api.chat(`${request},"skip":"full"}`, signal));
  if (settings.assumed && name === at("model").value) {
    await showModel(true); // an engine runs now, and reports its SkipConfig
    chosen = settings.asJson();
  }
  const reduced = `${request},"skip":${chosen}}`;
  await skip.show(api.chat(reduced, signal));
  const [overlay] = await api.overlay(reduced, signal);
  if (!signal.aborted) view.show(overlay);
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else lastRun = run();
});

/** Answer the question, and show errors. Meanwhile the button stops the answers. */
async function run() {
  running = new AbortController();
  at("ask").textContent = "Stop";
  showError(null);
  try {
    await answerTwice();
  } catch (error) {
    if (skip.root.dataset.state === "waiting") skip.clear();
    if (error instanceof ApiError && error.status === 401) at("key-field").hidden = false;
    if (error.name !== "AbortError") showError(error);
  } finally {
    running = null;
    at("ask").textContent = "Ask";
  }
}

at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});

function showError(error) {
  at("error").hidden = error === null;
  at("error").textContent = error?.message ?? "";
}

listModels();
