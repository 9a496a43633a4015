// The page: what is shown, what is asked, what is kept.

import { answer, Failed, models as askModels } from "./api.js";
import { forget, read, readKey, write, writeKey } from "./store.js";
import { Answer, make, problem, say, watchTokens } from "./view.js";

const $ = (id) => document.getElementById(id);
const state = read(); // turns: [{ prompt, mode, answers: { model: { pieces, note } } }]
let served = [];
let running = null; // an AbortController while answers grow

const chosen = () => served.filter((model) => state.chosen.includes(model.id));
const canChat = () => chosen().every((model) => model.chat);
const mode = () => (canChat() && state.mode !== "complete" ? "chat" : "complete");
const textOf = (made) => made.pieces.map(([text]) => text).join("");

async function start() {
  watchTokens($("talk"));
  wire();
  try {
    served = (await askModels(readKey())).filter((model) => model.completion);
    problem(served.length ? "" : "This server makes vectors only: use its API.");
  } catch (error) {
    problem(error instanceof Failed ? error.message : "The server does not answer.");
    if (error.status === 401) openSettings("key");
  }
  state.chosen = state.chosen.filter((name) => served.some((model) => model.id === name));
  if (!state.chosen.length) state.chosen = served.map((model) => model.id);
  drawAll();
}

function drawAll() {
  $("models").replaceChildren(...served.map((model) => make("button", "", model.id, {
    type: "button", ariaPressed: String(state.chosen.includes(model.id)), title: model.id,
    onclick: () => toggle(model.id),
  })));
  $("modes").hidden = !chosen().some((model) => model.chat);
  for (const button of $("modes").children) {
    button.ariaPressed = String(button.dataset.mode === mode());
    button.disabled = button.dataset.mode === "chat" && !canChat();
  }
  $("system-row").hidden = !served.some((model) => model.chat);
  $("turns").replaceChildren();
  state.turns.forEach((turn, number) => drawTurn(turn, number));
  drawEmpty();
  toEnd();
}

function drawEmpty() {
  $("empty").hidden = state.turns.length > 0 || !served.length;
  const names = chosen().map((model) => model.id).join(" and ");
  $("empty").querySelector(".lead").textContent = mode() === "chat"
    ? `Talk with ${names}.` : `Write the beginning: ${names} will go on.`;
  $("prompt").placeholder = mode() === "chat" ? "Say something" : "Write the beginning of a text";
}

// Shows a turn, and returns the answers on the page by model.
function drawTurn(turn, number) {
  const names = Object.keys(turn.answers);
  const several = names.length > 1;
  const node = make("article", `turn ${turn.mode} ${several ? "several" : ""}`);
  if (turn.mode === "chat" || several) node.append(make("div", "said", turn.prompt));
  const place = make("div", "answers");
  const shown = {};
  for (const name of names) {
    shown[name] = new Answer(name, {
      named: several || served.length > 1,
      given: turn.mode === "complete" && !several ? turn.prompt : "",
      onAgain: () => regenerate(number, name),
    });
    shown[name].again.hidden = number < state.turns.length - 1 && turn.mode === "chat";
    turn.answers[name].pieces.forEach((piece) => shown[name].add(piece));
    shown[name].end(turn.answers[name].note, turn.answers[name].failed);
    place.append(shown[name].node);
  }
  node.append(place);
  $("turns").append(node);
  $("turns").classList.toggle("wide", state.chosen.length > 1);
  return shown;
}

function toggle(name) {
  if (running) return;
  const on = state.chosen.includes(name);
  if (on && state.chosen.length === 1) return; // somebody has to answer
  state.chosen = on ? state.chosen.filter((other) => other !== name) : [...state.chosen, name];
  write(state);
  drawAll();
}

async function send() {
  const prompt = $("prompt").value;
  if (!prompt.trim() || running || !served.length) return;
  $("prompt").value = "";
  grow();
  const turn = { prompt, mode: mode(), answers: {} };
  for (const model of chosen()) turn.answers[model.id] = { pieces: [], note: "" };
  state.turns.push(turn);
  drawAll();
  const number = state.turns.length - 1;
  await generate(number, Object.keys(turn.answers));
}

async function regenerate(number, name) {
  if (running) return;
  state.turns[number].answers[name] = { pieces: [], note: "" };
  drawAll();
  await generate(number, [name]);
}

// Lets models answer a turn at the same time.
async function generate(number, names) {
  running = new AbortController();
  busy(true);
  problem("");
  const node = $("turns").children[number];
  const shown = redrawn(number, node);
  try {
    await Promise.all(names.map((name) => one(number, name, shown[name])));
  } finally {
    running = null;
    busy(false);
    write(state);
    say(`${names.join(" and ")}: finished`);
  }
}

function redrawn(number, node) {
  const shown = drawTurn(state.turns[number], number);
  node.replaceWith($("turns").lastElementChild);
  return shown;
}

async function one(number, name, shown) {
  const turn = state.turns[number];
  const made = turn.answers[name];
  const began = performance.now();
  let first = 0;
  let reason = "";
  shown.busy(true);
  try {
    const asked = { model: name, key: readKey(), signal: running.signal, ...options() };
    if (turn.mode === "chat") asked.messages = history(number, name);
    else asked.prompt = turn.prompt;
    for await (const piece of answer(asked)) {
      if (typeof piece === "string") {
        reason = piece;
        continue;
      }
      first ||= performance.now() - began;
      made.pieces.push(piece);
      const follows = atEnd();
      shown.add(piece);
      if (follows) toEnd();
    }
    made.note = note(made.pieces.length, first, performance.now() - began, reason);
  } catch (error) {
    const stopped = error.name === "AbortError";
    made.failed = !stopped;
    made.note = stopped ? `stopped after ${made.pieces.length} tokens` : error.message;
    if (error.status === 401) openSettings("key");
  }
  shown.end(made.note, made.failed);
  shown.busy(false);
  if (atEnd(80)) toEnd();
}

function note(count, first, total, reason) {
  const rate = count / Math.max(total / 1000, 1e-3);
  const why = reason === "length" ? ", cut by the limit" : "";
  return `${count} tokens${why}, ${rate.toFixed(0)} per second, the first after ` +
    `${(first / 1000).toFixed(2)} s`;
}

function options() {
  const { temperature, top_p, max_tokens, seed } = state.options;
  return { temperature, top_p, max_tokens, ...(seed === "" ? {} : { seed: Number(seed) }) };
}

// Each model has heard what it said itself.
function history(number, name) {
  const messages = state.options.system
    ? [{ role: "system", content: state.options.system }] : [];
  state.turns.slice(0, number + 1).forEach((turn, i) => {
    const made = turn.answers[name];
    if (turn.mode !== "chat" || (i < number && !made)) return;
    messages.push({ role: "user", content: turn.prompt });
    if (i < number) messages.push({ role: "assistant", content: textOf(made) });
  });
  return messages;
}

const atEnd = (slack = 40) => {
  const talk = $("talk");
  return talk.scrollHeight - talk.scrollTop - talk.clientHeight < slack;
};
const toEnd = () => { $("talk").scrollTop = $("talk").scrollHeight; };

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  for (const button of document.querySelectorAll("#fresh, #models button, #modes button")) {
    button.disabled = on || (button.dataset.mode === "chat" && !canChat());
  }
}

// Where the browser does not size a text area by its text.
function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}

function openSettings(focused = "temperature") {
  for (const [name, value] of Object.entries(state.options)) $(name).value = value;
  $("key").value = readKey();
  outputs();
  if (!$("settings").open) $("settings").showModal();
  $(focused).focus();
}

function outputs() {
  for (const name of ["temperature", "top_p"]) {
    document.querySelector(`output[for=${name}]`).value = Number($(name).value).toFixed(2);
  }
}

async function closeSettings() {
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    state.options[name] = Number($(name).value) || (name === "temperature" ? 0 : 1);
  }
  state.options.seed = $("seed").value;
  state.options.system = $("system").value;
  const changed = readKey() !== $("key").value;
  writeKey($("key").value);
  write(state);
  if (changed) location.reload();
}

function wire() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("input", grow);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("fresh").addEventListener("click", () => {
    state.turns = [];
    write(state);
    drawAll();
    $("prompt").focus();
  });
  for (const button of $("modes").children) {
    button.addEventListener("click", () => {
      state.mode = button.dataset.mode;
      write(state);
      drawAll();
    });
  }
  $("open-settings").addEventListener("click", () => openSettings());
  $("settings").addEventListener("input", outputs);
  $("settings").addEventListener("close", closeSettings);
  $("forget").addEventListener("click", () => {
    forget();
    location.reload();
  });
}

start();
