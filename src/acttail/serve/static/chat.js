"use strict";

const $ = (id) => document.getElementById(id);
const messages = [];
let about = null;
let running = null;

function show(kind, text) {
  const item = document.createElement("li");
  item.className = kind;
  const body = document.createElement("span");
  body.textContent = text;
  item.append(body);
  $("log").append(item);
  $("empty").hidden = true;
  item.scrollIntoView({ block: "end" });
  return { item, body };
}

function note(item, text) {
  const small = document.createElement("small");
  small.textContent = text;
  item.append(small);
}

function drafting(t) {
  if (!t.drafted) return "no drafts";
  return `${t.accepted} of ${t.drafted} drafts kept (${(100 * t.acceptance).toFixed(0)} %)`;
}

function describe(t) {
  const parts = [];
  if (t.tokens_per_second !== null) parts.push(`${t.tokens_per_second.toFixed(1)} tokens/s`);
  if (t.lossless) parts.push("lossless", drafting(t));
  else parts.push(t.sparsity > 0 ? `sparsity ${t.sparsity.toFixed(2)}` : "dense");
  if (t.weights_read !== null) parts.push(`${(100 * t.weights_read).toFixed(1)} % of weights read`);
  parts.push(`first token after ${t.prefill_seconds.toFixed(2)} s`);
  return parts.join(", ");
}

function how(a) {
  const plan = (of) => `plan of ${of.allocator}, sparsity ${of.sparsity}`;
  if (!a.lossless) return a.allocator ? plan(a) : "dense";
  const who = [];
  if (a.drafters.allocator) who.push(plan(a.drafters));
  if (a.drafters.ngrams) who.push("n-grams");
  return `lossless (drafts: ${who.join("; ")})`;
}

async function start() {
  for (const name of ["sparsity", "temperature"]) {
    $(name).addEventListener("input", () => { $(`${name}-value`).textContent = Number($(name).value).toFixed(name === "sparsity" ? 2 : 1); });
  }
  try {
    about = await (await fetch("/about")).json();
  } catch {
    $("about").textContent = "the server does not answer";
    return;
  }
  document.title = `${about.model} – acttail`;
  $("model").textContent = about.model;
  $("about").textContent = `${about.engine} engine, ${about.dtype}, ${how(about)}, context of ${about.context} tokens, acttail ${about.version}`;
  $("sparsity").value = about.sparsity;
  $("sparsity").disabled = !about.adjustable;
  $("fixed").textContent = about.adjustable ? "" : `fixed: ${about.fixed_because}`;
  for (const name of ["sparsity", "temperature"]) $(name).dispatchEvent(new Event("input"));
  $("prompt").focus();
}

// Server-sent events of a fetch, one parsed JSON value at a time.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function request(text) {
  const body = { model: about.model, stream: true, temperature: Number($("temperature").value) };
  if (about.adjustable) body.sparsity = Number($("sparsity").value);
  if (about.chat) return ["/v1/chat/completions", { ...body, messages }];
  return ["/v1/completions", { ...body, prompt: text, max_tokens: 128 }];
}

async function send(text) {
  messages.push({ role: "user", content: text });
  show("user", text);
  const { item, body } = show("assistant", "");
  const [path, payload] = request(text);
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("status").textContent = "decoding …";
  let tokens = 0;
  let first = 0;
  try {
    const headers = { "Content-Type": "application/json" };
    if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
    const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(payload), signal: running.signal });
    if (response.status === 401) $("key-row").hidden = false;
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      const piece = choice.delta ? choice.delta.content : choice.text;
      if (piece) {
        body.textContent += piece;
        tokens += 1;
        first = first || performance.now();
        if (tokens > 1) $("status").textContent = `${(1000 * (tokens - 1) / (performance.now() - first)).toFixed(1)} tokens/s`;
        item.scrollIntoView({ block: "end" });
      }
      if (event.acttail) note(item, describe(event.acttail) + (choice.finish_reason === "length" ? "; cut at its length" : ""));
    }
    $("status").textContent = "";
  } catch (error) {
    if (error.name === "AbortError") {
      note(item, "stopped");
      $("status").textContent = "";
    } else {
      item.className = "error";
      body.textContent = error.message;
      $("status").textContent = "";
      messages.pop();
      $("prompt").value = text;
    }
  } finally {
    if (item.className === "assistant") messages.push({ role: "assistant", content: body.textContent });
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    $("prompt").focus();
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running || !about) return;
  $("prompt").value = "";
  send(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
$("stop").addEventListener("click", () => running && running.abort());
$("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages.length = 0;
  $("log").replaceChildren();
  $("empty").hidden = false;
  $("prompt").focus();
});
start();
