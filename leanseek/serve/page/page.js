// The chat page: chats kept in this browser, answers streamed from the service beside it.
//
// What a model wrote becomes HTML in one place only, `show`, and only after the service has rendered and cleaned it.
"use strict";

const $ = (id) => document.getElementById(id);
const STORE = "leanseek";
const DEFAULTS = { system: "", temperature: 0.8, top_p: 0.95, min_p: 0, max_tokens: "", seed: "", key: "" };
const THEMES = ["auto", "light", "dark"];
const policy = window.trustedTypes?.createPolicy("leanseek", { createHTML: (html) => html }) ?? { createHTML: (html) => html };

let state = load();
let running = null; // {chat, message, abort} of the answer that is being written
let served = null; // what /v1/models says

// ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────

function load() {
  let kept = null;
  try {
    kept = JSON.parse(localStorage.getItem(STORE));
  } catch {
    // not ours, or no storage: begin anew
  }
  const chats = Array.isArray(kept?.chats) ? kept.chats.filter((chat) => chat && Array.isArray(chat.messages)) : [];
  for (const message of chats.flatMap((chat) => chat.messages)) {
    if (message.writing) {
      delete message.writing; // the page was closed while it was written
      message.stopped = true;
    }
  }
  return {
    chats,
    current: chats.some((chat) => chat.id === kept.current) ? kept.current : null,
    settings: { ...DEFAULTS, ...kept?.settings },
    theme: THEMES.includes(kept?.theme) ? kept.theme : "auto",
  };
}

let saving = 0;

function save() {
  clearTimeout(saving);
  saving = 0;
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    toast("This browser keeps no more: delete a chat to keep this one.");
  }
}

function saveSoon() {
  saving ||= setTimeout(save, 400);
}

const current = () => state.chats.find((chat) => chat.id === state.current) ?? null;

// ── small things ─────────────────────────────────────────────────────────────────────────────────────────────────────

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "use"));
  svg.firstChild.setAttribute("href", `#i-${name}`);
  return svg;
}

function button(name, label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.title = label;
  made.setAttribute("aria-label", label);
  made.append(icon(name));
  made.addEventListener("click", act);
  return made;
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

let toasting = 0;

function toast(text, undo = null) {
  const [said, button] = $("toast").children;
  said.textContent = text;
  button.hidden = !undo;
  button.onclick = () => {
    $("toast").hidden = true;
    undo();
  };
  $("toast").hidden = false;
  clearTimeout(toasting);
  toasting = setTimeout(() => ($("toast").hidden = true), 6000);
}

async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // away from localhost browsers want HTTPS for that: the old way works
    const area = element("textarea", "unseen");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    from.focus();
  }
  const use = from.querySelector("use");
  use.setAttribute("href", "#i-done");
  setTimeout(() => use.setAttribute("href", "#i-copy"), 1400);
  $("status").textContent = "Copied";
}

const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

// ── the service ──────────────────────────────────────────────────────────────────────────────────────────────────────

async function call(path, body = null, signal = null) {
  const headers = { "Content-Type": "application/json" };
  if (state.settings.key) headers.Authorization = `Bearer ${state.settings.key}`;
  const options = body === null ? { headers, signal } : { method: "POST", headers, signal, body: JSON.stringify(body) };
  const response = await fetch(path, options);
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    const error = new Error(told?.error?.message ?? `the service answered ${response.status}`);
    error.status = response.status;
    error.code = told?.error?.code;
    throw error;
  }
  return response;
}

/** The chunks of a streamed answer. */
async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (pending + value).split("\n");
    pending = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

function asked(chat, upTo) {
  const { system, temperature, top_p, min_p, max_tokens, seed } = state.settings;
  const said = chat.messages.slice(chat.from ?? 0, upTo).filter((message) => !message.error || message.content);
  const messages = said.map(({ role, content }) => ({ role, content }));
  if (system.trim()) messages.unshift({ role: "system", content: system });
  const body = { model: served.id, messages, temperature, top_p, min_p, stream: true, stream_options: { include_usage: true } };
  if (max_tokens) body.max_tokens = Number(max_tokens);
  if (seed !== "") body.seed = Number(seed);
  return body;
}

async function drafts() {
  const { drafted, accepted } = await (await call("/health")).json();
  return { drafted, accepted };
}

/** Has the last message of the chat answered: adds the answer, and lets it grow. */
async function answer(chat) {
  const message = { role: "assistant", content: "", thoughts: "", writing: true };
  chat.messages.push(message);
  running = { chat, message, abort: new AbortController() };
  draw();
  toBottom();
  $("status").textContent = "The answer is being written";
  try {
    served ?? (await greet(true));
    const before = await drafts();
    const response = await begin(chat, running.abort.signal);
    let first = 0;
    for await (const chunk of chunks(response)) {
      const delta = chunk.choices[0]?.delta ?? {};
      if (delta.content || delta.reasoning_content) {
        first ||= performance.now();
        message.thoughts += delta.reasoning_content ?? "";
        message.content += delta.content ?? "";
        grown(chat, message);
      }
      if (chunk.choices[0]?.finish_reason === "length") message.cut = true;
      if (chunk.usage) message.stats = await measured(chunk.usage.completion_tokens, first, before);
    }
  } catch (error) {
    if (error.name === "AbortError") message.stopped = true;
    else message.error = error instanceof TypeError ? "The service cannot be reached." : said(error.message);
    if (error.status === 401) openPanel("key");
  }
  if (message.content) await html(message.content, true).catch(() => {}); // so that nothing flickers
  delete message.writing;
  running = null;
  save();
  draw();
  $("status").textContent = message.error ? "" : message.stopped ? "Stopped" : "The answer is complete";
}

const said = (text) => text.charAt(0).toUpperCase() + text.slice(1) + ".";

/** Sends the chat; what is too old for the model's context is left out, an exchange at a time. */
async function begin(chat, signal) {
  for (;;) {
    try {
      return await call("/v1/chat/completions", asked(chat, -1), signal);
    } catch (error) {
      const from = (chat.from ?? 0) + 2;
      if (error.code !== "context_length_exceeded" || from > chat.messages.length - 2) throw error;
      chat.from = from;
      draw();
    }
  }
}

async function measured(tokens, first, before) {
  const seconds = (performance.now() - first) / 1000;
  const after = await drafts();
  const drafted = after.drafted - before.drafted;
  return {
    tokens,
    rate: tokens > 1 && seconds > 0 ? tokens / seconds : null,
    kept: drafted > 0 ? (after.accepted - before.accepted) / drafted : null,
  };
}

/** Asks who is there. */
async function greet(insist = false) {
  try {
    served = (await (await call("/v1/models")).json()).data[0];
  } catch (error) {
    if (error.status === 401 && !insist) openPanel("key");
    if (insist) throw error;
    $("about").textContent = error.status ? said(error.message) : "The service cannot be reached.";
    return;
  }
  $("model").textContent = $("model").title = served.id;
  const length = served.context_length.toLocaleString("en");
  $("about").textContent = `${served.id} keeps ${length} tokens of a conversation in mind.`;
}

// ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────

const known = new Map(); // HTML by text, of texts that do not grow any more

async function html(text, keep) {
  if (known.has(text)) return known.get(text);
  const rendered = (await (await call("/page/render", { text })).json()).html;
  if (keep) known.set(text, rendered);
  return rendered;
}

/** The only door through which HTML comes into the page. */
function show(node, rendered) {
  node.classList.remove("raw");
  node.innerHTML = policy.createHTML(rendered);
  for (const pre of node.querySelectorAll("pre")) {
    const language = /language-(\S+)/.exec(pre.firstElementChild?.className ?? "")?.[1] ?? "text";
    const top = element("div", "code-top");
    const act = button("copy", "Copy the code", () => copy(pre.textContent, act));
    top.append(element("span", "", language), act);
    const block = element("div", "code");
    pre.replaceWith(block);
    block.append(top, pre);
    pre.tabIndex = 0; // so that a keyboard can scroll it
  }
}

/** Renders one growing text at a pace the service can keep. */
class Live {
  constructor(node) {
    this.node = node;
    this.text = this.shown = "";
    this.busy = false;
  }

  push(text, last = false) {
    this.text = text;
    this.last = last;
    if (!this.shown && !this.node.firstElementChild) {
      this.node.classList.add("raw");
      this.node.textContent = text; // until the first rendering is there
    }
    if (!this.busy) this.run();
  }

  async run() {
    this.busy = true;
    while (this.shown !== this.text && (this.node.isConnected || this.last)) {
      const text = this.text;
      const began = performance.now();
      try {
        show(this.node, await html(text, this.last));
        follow();
      } catch {
        this.node.textContent = text; // plain is better than nothing
        this.node.classList.add("raw");
      }
      this.shown = text;
      await sleep(this.last ? 0 : Math.max(60, 2 * (performance.now() - began)));
    }
    this.busy = false;
  }
}

const drawn = new WeakMap(); // message → {item, live, thoughts}
const unfolded = new WeakSet(); // messages whose thoughts are open

function drawMessage(chat, message, index) {
  const item = $("message").content.firstElementChild.cloneNode(true);
  const [who, thoughts, text, fault, tools] = item.children;
  const parts = { item, live: new Live(text), thoughts };
  drawn.set(message, parts);
  item.classList.add(message.role);
  who.textContent = message.role === "user" ? "You: " : "Model: ";
  if (message.role === "user") {
    text.textContent = message.content;
    tools.append(
      button("edit", "Edit and send again", () => edit(chat, index)),
      button("copy", "Copy", (event) => copy(message.content, event.currentTarget)),
    );
    return item;
  }
  grownThoughts(message, parts);
  item.classList.toggle("writing", Boolean(message.writing));
  item.setAttribute("aria-busy", String(Boolean(message.writing)));
  thoughts.open = unfolded.has(message);
  thoughts.addEventListener("toggle", () => (thoughts.open ? unfolded.add(message) : unfolded.delete(message)));
  if (known.has(message.content)) show(text, known.get(message.content));
  else if (message.content) parts.live.push(message.content, !message.writing);
  else if (!message.writing && !message.error) {
    text.append(element("span", "nothing", message.stopped ? "Stopped before the first word." : "The model said nothing."));
  }
  if (message.error) {
    fault.textContent = message.error;
    fault.hidden = false;
  }
  tools.prepend(
    button("copy", "Copy", (event) => copy(message.content, event.currentTarget)),
    button("again", "Answer again", () => again(chat, index)),
  );
  tools.querySelector(".stats").textContent = told(message);
  return item;
}

function told({ stats, stopped, cut }) {
  const words = [];
  if (stats) words.push(`${stats.tokens} token${stats.tokens === 1 ? "" : "s"}`);
  if (stats?.rate) words.push(`${stats.rate < 10 ? stats.rate.toFixed(1) : Math.round(stats.rate)} per second`);
  if (stats?.kept != null) words.push(`${Math.round(100 * stats.kept)}% of drafts accepted`);
  if (stopped) words.push("stopped");
  if (cut) words.push("cut at the limit");
  return words.join(" · ");
}

function grownThoughts(message, { thoughts }) {
  thoughts.hidden = !message.thoughts;
  if (!message.thoughts) return;
  thoughts.firstElementChild.textContent = message.writing && !message.content ? "Thinking" : "Thoughts";
  thoughts.lastElementChild.textContent = message.thoughts;
}

function grown(chat, message) {
  saveSoon();
  const parts = drawn.get(message);
  if (chat !== current() || !parts?.item.isConnected) return;
  grownThoughts(message, parts);
  if (message.content) parts.live.push(message.content);
  follow();
}

function edit(chat, index) {
  if (running) return;
  const message = chat.messages[index];
  const { item } = drawn.get(message);
  const box = element("form", "edit");
  const area = document.createElement("textarea");
  area.value = message.content;
  area.setAttribute("aria-label", "Your message, to be changed");
  const row = element("div", "row");
  const cancel = element("button", "quiet", "Cancel");
  const send = element("button", "strong", "Send");
  cancel.type = "button";
  row.append(cancel, send);
  box.append(area, row);
  const close = () => {
    draw();
    $("input").focus();
  };
  cancel.addEventListener("click", close);
  box.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running || !area.value.trim()) return;
    chat.messages.splice(index);
    delete chat.from;
    say(chat, area.value.trim());
    $("input").focus();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (sends(event)) {
      event.preventDefault();
      box.requestSubmit();
    }
  });
  item.replaceChildren(box);
  area.style.height = `${Math.min(area.scrollHeight + 4, innerHeight / 2)}px`;
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function again(chat, index) {
  if (running) return;
  chat.messages.splice(index);
  answer(chat);
  $("input").focus();
}

function say(chat, text) {
  chat.messages.push({ role: "user", content: text });
  if (!chat.named && chat.messages.length === 1) chat.title = titled(text);
  chat.touched = Date.now();
  state.chats.sort((a, b) => b.touched - a.touched);
  answer(chat);
}

function titled(text) {
  const line = text.split("\n", 1)[0].trim();
  return line.length > 48 ? `${line.slice(0, 46).trimEnd()}…` : line;
}

// ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

function draw() {
  const chat = current();
  const messages = chat?.messages ?? [];
  const stick = atBottom();
  $("title").textContent = chat?.title ?? "New chat";
  document.title = chat ? `${chat.title} · LeanSeek` : "LeanSeek";
  $("empty").hidden = messages.length > 0;
  const items = messages.map((message, index) => drawMessage(chat, message, index));
  if (chat?.from) items.splice(chat.from, 0, element("li", "forgotten", "What stands above no longer fits the model's context."));
  $("messages").replaceChildren(...items);
  drawList();
  drawSend();
  if (stick) toBottom();
}

function drawList() {
  const items = state.chats.map((chat) => {
    const item = document.createElement("li");
    const open = element("button", "open", chat.title);
    open.type = "button";
    open.title = chat.title;
    if (chat.id === state.current) {
      item.className = "current";
      open.setAttribute("aria-current", "true");
    }
    open.addEventListener("click", () => go(chat.id));
    open.addEventListener("dblclick", () => rename(chat, item));
    const acts = element("span", "acts");
    acts.append(
      button("edit", `Rename ${chat.title}`, () => rename(chat, item)),
      button("bin", `Delete ${chat.title}`, () => remove(chat)),
    );
    item.append(open, acts);
    return item;
  });
  $("list").replaceChildren(...items);
}

function drawSend() {
  const send = $("send");
  send.disabled = !running && !$("input").value.trim();
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  send.title = running ? "Stop (Esc)" : "Send (Enter)";
  send.querySelector("use").setAttribute("href", running ? "#i-stop" : "#i-send");
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function drawTheme() {
  if (state.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = state.theme;
  const label = `Colours: ${{ auto: "as the system", light: "light", dark: "dark" }[state.theme]}`;
  $("theme").querySelector("use").setAttribute("href", `#i-${state.theme}`);
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
}

// ── where the reader is ──────────────────────────────────────────────────────────────────────────────────────────────

let following = true; // the reader has not scrolled away

function atBottom() {
  const box = $("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 60;
}

function toBottom() {
  following = true;
  $("scroll").scrollTop = $("scroll").scrollHeight;
  $("latest").hidden = true;
}

function follow() {
  if (following) toBottom();
}

// ── chats ────────────────────────────────────────────────────────────────────────────────────────────────────────────

function go(id) {
  state.current = id;
  showSide(false);
  save();
  draw();
  toBottom();
  $("input").focus();
}

function rename(chat, item) {
  const input = document.createElement("input");
  input.value = chat.title;
  input.setAttribute("aria-label", "The chat's name");
  let done = false;
  const close = (keep) => {
    if (done) return;
    done = true;
    if (keep && input.value.trim()) {
      chat.title = input.value.trim().slice(0, 120);
      chat.named = true;
      save();
    }
    draw();
  };
  input.addEventListener("blur", () => close(true));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") close(true);
    if (event.key === "Escape") {
      event.stopPropagation();
      close(false);
    }
  });
  item.replaceChildren(input);
  input.select();
}

function remove(chat) {
  if (running?.chat === chat) running.abort.abort();
  const index = state.chats.indexOf(chat);
  const was = state.current;
  state.chats.splice(index, 1);
  if (was === chat.id) state.current = null;
  save();
  draw();
  toast("Chat deleted", () => {
    state.chats.splice(index, 0, chat);
    state.current = was;
    save();
    draw();
  });
}

function showSide(shown) {
  $("side").classList.toggle("shown", shown);
  $("shade").hidden = !shown;
  $("menu").setAttribute("aria-expanded", String(shown));
  if (shown) $("new").focus();
}

// ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────

function openPanel(field = null) {
  fill();
  if (!$("panel").open) $("panel").showModal();
  if (field) $(field).focus();
}

function fill() {
  for (const name of Object.keys(DEFAULTS)) {
    $(name).value = state.settings[name];
    const output = document.querySelector(`output[for="${name}"]`);
    if (output) output.textContent = Number(state.settings[name]).toFixed(2);
  }
}

for (const name of Object.keys(DEFAULTS)) {
  $(name).addEventListener("input", ({ target }) => {
    if (!target.validity.valid) return;
    state.settings[name] = typeof DEFAULTS[name] === "number" ? Number(target.value) : target.value;
    saveSoon();
    const output = document.querySelector(`output[for="${name}"]`);
    if (output) output.textContent = Number(target.value).toFixed(2);
  });
}

$("reset").addEventListener("click", () => {
  state.settings = { ...DEFAULTS, key: state.settings.key };
  save();
  fill();
});
$("panel").addEventListener("close", () => {
  save();
  if (!served) greet();
  $("input").focus();
});
$("panel").addEventListener("click", (event) => {
  if (event.target === $("panel")) $("panel").close(); // beside the panel
});

// ── hands ────────────────────────────────────────────────────────────────────────────────────────────────────────────

// While an input method composes a word, Enter belongs to it.
const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) {
    running.abort.abort();
    return;
  }
  const text = $("input").value.trim();
  if (!text) return;
  $("input").value = "";
  grow();
  let chat = current();
  if (!chat) {
    chat = { id: String(Date.now()) + Math.random().toString(36).slice(2, 8), title: "", messages: [], touched: 0 };
    state.chats.unshift(chat);
    state.current = chat.id;
  }
  say(chat, text);
});

$("input").addEventListener("input", () => {
  grow();
  drawSend();
});

$("input").addEventListener("keydown", (event) => {
  if (sends(event)) {
    event.preventDefault();
    if (!running) $("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !$("input").value && !running) {
    const chat = current();
    const index = chat?.messages.findLastIndex((message) => message.role === "user") ?? -1;
    if (index >= 0) {
      event.preventDefault();
      edit(chat, index);
    }
  }
});

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    if ($("panel").open) $("panel").close();
    go(null);
  } else if (event.key === "Escape" && !$("panel").open) {
    if ($("side").classList.contains("shown")) showSide(false);
    else running?.abort.abort();
  }
});

$("new").addEventListener("click", () => go(null));
$("menu").addEventListener("click", () => showSide(!$("side").classList.contains("shown")));
$("shade").addEventListener("click", () => showSide(false));
$("tune").addEventListener("click", () => openPanel());
$("latest").addEventListener("click", toBottom);
$("theme").addEventListener("click", () => {
  state.theme = THEMES[(THEMES.indexOf(state.theme) + 1) % THEMES.length];
  save();
  drawTheme();
});
$("scroll").addEventListener("scroll", () => {
  following = atBottom();
  $("latest").hidden = following;
});
addEventListener("pagehide", save);
addEventListener("storage", ({ key }) => {
  if (key === STORE && !running) {
    const here = state.current; // another tab wrote: its chats, our place
    state = load();
    if (state.chats.some((chat) => chat.id === here)) state.current = here;
    draw();
  }
});
if (/Mac|iPhone|iPad/.test(navigator.platform)) $("new").querySelector("kbd").textContent = "⌘ K";

drawTheme();
fill();
draw();
toBottom();
greet();
