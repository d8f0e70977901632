// Adding files to the library: uploads one after another, and the queue of the server.

import { $, make, many } from "./dom.js";
import { call, facts, refuseLargeFile, sendToLibrary } from "./server.js";

const POLL_MILLISECONDS = 1500;
const WORDS = {
  waiting: "Waits for the upload",
  uploading: "Uploading",
  queued: "Waits to be indexed",
  running: "Indexing",
  added: "Added",
  failed: "Failed",
};

const entries = []; // {file, name, stored: its name on the server, state: one of WORDS, row}
let isSending = false;
let polling = null;
let announce = () => {};

const isOpen = ({ state }) => state !== "added" && state !== "failed";

/** Adds files. */
export function addFiles(files) {
  for (const file of files) {
    const entry = { file, name: file.name, state: "" };
    entry.row = rowOf(entry);
    entries.push(entry);
    $("adding-list").append(entry.row);
    try {
      refuseLargeFile(file);
      set(entry, "waiting");
    } catch (error) {
      set(entry, "failed", error.message);
    }
  }
  $("adding").hidden = false;
  send();
}

async function send() {
  if (isSending) return;
  isSending = true;
  for (let entry; (entry = entries.find(({ state }) => state === "waiting")); ) {
    set(entry, "uploading");
    try {
      entry.stored = await sendToLibrary(entry.file, (share) => showProgress(entry, share));
      set(entry, "queued");
      poll();
    } catch (error) {
      set(entry, "failed", error.message);
    }
    entry.file = null;
  }
  isSending = false;
}

function rowOf({ name }) {
  const title = make("b", { dir: "auto", textContent: name, title: name });
  const progress = make("progress", { max: 1, value: 0, hidden: true, ariaLabel: `Upload of ${name}` });
  return make("li", {}, title, make("span", { className: "state" }), progress);
}

function set(entry, state, reason = "") {
  if (entry.state === state) return;
  entry.state = entry.row.className = state;
  entry.row.querySelector(".state").textContent = reason ? `${WORDS[state]}: ${reason}` : WORDS[state];
  entry.row.querySelector("progress").hidden = state !== "uploading";
  if (state === "failed") $("adding").hidden = false;
  summarize();
}

function showProgress(entry, share) {
  const progress = entry.row.querySelector("progress");
  progress.value = share;
  entry.row.querySelector(".state").textContent = `${WORDS.uploading}, ${Math.round(100 * share)} %`;
}

/** Writes one short sentence for screen readers whenever the number of finished files changes. */
function summarize() {
  const count = (state) => entries.filter((entry) => entry.state === state).length;
  const failed = count("failed") ? `, ${count("failed")} failed` : "";
  const text = `${count("added")} of ${many(entries.length, "file")} added${failed}`;
  if ($("adding-status").textContent !== text) $("adding-status").textContent = text;
}

function poll() {
  polling ??= setTimeout(async () => {
    polling = null;
    const queue = await call("api/add").catch(() => null);
    if (queue) entries.filter((entry) => entry.stored && isOpen(entry)).forEach((entry) => update(entry, queue));
    if (entries.some((entry) => entry.stored && isOpen(entry))) poll();
  }, POLL_MILLISECONDS);
}

function update(entry, { waiting, running, done, failed }) {
  const failure = failed.find(({ name }) => name === entry.stored);
  if (running === entry.stored) set(entry, "running");
  else if (waiting.includes(entry.stored)) set(entry, "queued");
  else if (failure) set(entry, "failed", failure.reason);
  else if (done.includes(entry.stored)) {
    set(entry, "added");
    announce();
  }
}

/** Shows files that the server still indexes, e.g. after the page was loaded again. */
async function showQueue() {
  const queue = await call("api/add").catch(() => null);
  const names = queue ? [...(queue.running ? [queue.running] : []), ...queue.waiting] : [];
  for (const name of names) {
    const entry = { name, stored: name, state: "" };
    entry.row = rowOf(entry);
    entries.push(entry);
    $("adding-list").append(entry.row);
    update(entry, queue);
  }
  if (!names.length) return;
  $("adding").hidden = false;
  poll();
}

/** Shows the ways to add files if the server allows it; `afterAdding` is called for each added file. */
export function setUpLibrary(afterAdding) {
  announce = afterAdding;
  if (!facts.can_add) return;
  $("add").hidden = false;
  $("add").onclick = () => $("add-files").click();
  $("add-files").onchange = () => {
    addFiles([...$("add-files").files]);
    $("add-files").value = ""; // the same file can be chosen again
  };
  $("adding-close").onclick = () => {
    $("adding").hidden = true;
    if (!entries.some(isOpen)) entries.splice(0).forEach(({ row }) => row.remove());
    $("add").focus();
  };
  addEventListener("beforeunload", (event) => isSending && event.preventDefault());
  showQueue();
}
