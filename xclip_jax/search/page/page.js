// The search page: queries, filters, the list that grows, and files that are dropped.

import { addressWith, FILTERS, hasQuery, readState, searchKey } from "./address.js";
import { $, make, many, nameOf, range } from "./dom.js";
import { hideEmpty, showNothingFound, showStart } from "./empty.js";
import { addFiles, setUpLibrary } from "./library.js";
import { closePlayer, openHit, openPlayer, setUpPlayer } from "./player.js";
import { addHits, countFilms, findHit, showHits } from "./results.js";
import { facts, fetchSegment, isFolding, loadFacts, requestAnswer } from "./server.js";

const CACHED_ANSWERS = 20;
const SILENT_MILLISECONDS = 200; // answers that come faster are not announced as "Searching…"
const SOURCES = ["picture", "speech", "text"];

const examples = new Map(); // example files by their key in the address
const answers = new Map(); // for the Back button
let shown = { key: null, state: readState(), answer: null };
let running = new AbortController();
let isLoadingMore = false;
let hasGoneBack = Promise.resolve(); // the step back of the last player that was closed

// ---- the form

async function go(state) {
  await hasGoneBack;
  const key = searchKey(state);
  answers.delete(key);
  if (key === location.hash) {
    shown.key = null;
    render();
  } else {
    location.hash = key;
  }
}

const availableSources = () => SOURCES.filter((source) => facts.sources.includes(source));

/** Returns the state of a query with the filters of the form, or throws an error if these are invalid. */
function stateOfForm(query) {
  const state = new URLSearchParams(query);
  for (const name of FILTERS) {
    const value = $(name).value.trim();
    if (value) state.set(name, value);
  }
  if ($("dedupe").checked !== facts.dedupe) state.set("dedupe", facts.dedupe ? "0" : "1");
  if (!state.has("q")) return state;
  const checked = availableSources().filter((source) => $(`in-${source}`).checked);
  if (!checked.length) throw new Error("Search in at least one of seen, said and written.");
  if (checked.length < availableSources().length) state.set("in", checked.join(","));
  return state;
}

/** Shows the sentence of the address, unless its answer is shown already. */
function fillText() {
  const state = readState();
  if (searchKey(state) !== shown.key) $("text").value = state.get("q") ?? "";
}

function fillForm(state) {
  for (const name of FILTERS) $(name).value = state.get(name) ?? "";
  const sources = state.get("in")?.split(",") ?? SOURCES;
  for (const source of SOURCES) $(`in-${source}`).checked = sources.includes(source);
  $("dedupe").checked = isFolding(state);
  const count = countFilters(state);
  $("filters-count").textContent = count ? `${count} on` : "";
  if (count) $("filters").open = true;
}

const countFilters = (state) => [...FILTERS, "in", "dedupe"].filter((name) => state.get(name)).length;

async function submit(event) {
  event?.preventDefault();
  await isReady; // one can type while the page loads
  const sentence = $("text").value.trim();
  const current = readState();
  const other = ["like", "example"].find((name) => current.has(name));
  try {
    if (sentence) go(stateOfForm({ q: sentence }));
    else if (other) go(stateOfForm({ [other]: current.get(other) })); // its filters have changed
    else throw new Error("Type a few words that describe the video.");
  } catch (error) {
    refuse(error.message);
  }
}

function refuse(message) {
  running.abort();
  shown.key = null;
  setBusy(false);
  showAnswer(null, new URLSearchParams(), message);
  $("text").focus();
}

function submitIfSearching() {
  if (hasQuery(readState())) submit();
}

function clearFilters() {
  const state = readState();
  const query = ["q", "like", "example"].filter((name) => state.has(name)).map((name) => [name, state.get(name)]);
  $("text").focus();
  go(new URLSearchParams(query));
}

// ---- searching

/** Updates the page to the state in the address. */
async function render() {
  await isReady;
  const state = readState();
  const key = searchKey(state);
  if (key !== shown.key) {
    fillForm(state);
    if (!(await search(state, key))) return;
  }
  await showOpen(state);
}

async function showOpen(state) {
  const id = state.get("open");
  if (!id) return closePlayer();
  const at = state.has("at") ? Number(state.get("at")) : null;
  const hits = shown.answer?.hits ?? [];
  let hit = findHit(hits, id, at);
  try {
    hit ??= segmentAt(await fetchSegment(id), at);
  } catch (error) {
    history.replaceState(null, "", addressWith(state));
    closePlayer();
    return showError(error.message);
  }
  if (readState().get("open") === id && openHit() !== hit) openPlayer(hit, hits, state);
}

/** Returns a segment that is none of the results as a moment of them. */
function segmentAt(segment, at) {
  return { ...segment, rank: 0, second: Number.isFinite(at) && at !== null ? at : segment.second };
}

/** Searches and shows the answer; returns false if another search has replaced this one. */
async function search(state, key) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  setBusy(hasQuery(state));
  try {
    const cached = answers.get(key);
    const answer = !hasQuery(state) ? null : (cached ?? (await requestAnswer(state, 0, examples, signal)));
    if (signal.aborted) return false;
    if (answer) cache(key, answer);
    showAnswer(answer, state);
  } catch (error) {
    if (signal.aborted) return false;
    showAnswer(null, state, error.message);
  }
  shown.key = key;
  setBusy(false);
  return true;
}

function setBusy(isBusy) {
  clearTimeout(setBusy.timer);
  $("results").ariaBusy = String(isBusy);
  if (isBusy) setBusy.timer = setTimeout(() => say("Searching…"), SILENT_MILLISECONDS);
}

/** Writes what screen readers hear, once for each change. */
function say(counts, note = "") {
  if ($("counts").textContent !== counts) $("counts").textContent = counts;
  if ($("note").textContent !== note) $("note").textContent = note;
}

function cache(key, answer) {
  answers.delete(key);
  answers.set(key, answer);
  if (answers.size > CACHED_ANSWERS) answers.delete(answers.keys().next().value);
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function showAnswer(answer, state, error = "") {
  shown = { key: null, state, answer };
  const title = state.get("q") || state.get("example")?.split("|")[0];
  document.title = title ? `${title} – Video search` : "Video search";
  showError(error);
  showExample(answer, state);
  showHits(answer?.hits ?? [], state);
  showCounts(answer);
  if (answer?.hits.length || error) hideEmpty();
  else if (answer) showNothingFound([...FILTERS, "in"].some((name) => state.get(name)) ? clearFilters : null);
  else showStart();
  showMore();
}

function showCounts(answer) {
  $("cost").textContent = "";
  if (!answer) return say("");
  const { hits, done, note } = answer;
  const counts = `${many(hits.length, "moment")} in ${many(countFilms(), "film")}${done ? "" : ", more below"}`;
  const areWeak = hits.length > 0 && hits.every(({ weak }) => weak) ? ", all of them weak matches" : "";
  say(hits.length ? counts + areWeak : "No results", note ?? "");
  const milliseconds = Math.max(1, Math.round(answer.seconds * 1000)).toLocaleString("en");
  const stage = ([name, seconds]) => `${name} ${(seconds * 1000).toFixed(1)} ms`;
  $("cost").title = Object.entries(answer.stages).map(stage).join("\n");
  $("cost").textContent = `${many(answer.searched, "segment")} in ${milliseconds} ms`;
}

/** Shows the example that was searched by: a segment of the index, or a file with its picture. */
function showExample(answer, state) {
  const [file, segment] = [examples.get(state.get("example")), answer?.like];
  $("example").hidden = !(file || segment);
  if (!file && !segment) return $("example").replaceChildren();
  const name = make("b", { dir: "auto", textContent: segment ? nameOf(segment) : file.name });
  const words = make("span", {}, "Similar to ", name, segment ? `, ${range(segment)}` : "");
  $("example").replaceChildren(...exampleImage(file, segment), words);
}

function exampleImage(file, segment) {
  if (segment) return [make("img", { src: `thumbnail/${segment.id}`, alt: "" })];
  if (!file.type.startsWith("image/")) return [];
  const image = make("img", { src: URL.createObjectURL(file), alt: "" });
  image.onload = image.onerror = () => URL.revokeObjectURL(image.src);
  return [image];
}

// ---- further results

const observer = new IntersectionObserver(
  (entries) => entries.some((entry) => entry.isIntersecting) && loadMore(),
  { rootMargin: "0px 0px 500px 0px" },
);

/** Shows the button of further results; with `observe`, they also come when it is near. */
function showMore(observe = true, message = "") {
  const { answer } = shown;
  observer.disconnect();
  $("more").hidden = !answer || answer.done;
  $("more-error").textContent = message;
  $("more-button").textContent = message ? "Try again" : "Show more";
  if (observe && !$("more").hidden) observer.observe($("more"));
}

async function loadMore() {
  const { answer, state } = shown;
  if (isLoadingMore || !answer || answer.done || !shown.key) return;
  isLoadingMore = true;
  $("more-button").textContent = "Loading…";
  const { signal } = running;
  try {
    const next = await requestAnswer(state, answer.hits.length, examples, signal);
    if (!signal.aborted && shown.answer === answer) append(answer, next, state);
  } catch (error) {
    if (!signal.aborted) showMore(false, error.message);
  }
  isLoadingMore = false;
}

function append(answer, next, state) {
  answer.hits.push(...next.hits);
  answer.done = next.done;
  const hadFocus = document.activeElement === $("more-button");
  const cards = addHits(next.hits, state);
  showCounts(answer);
  showMore(cards.length > 0); // else the page has not grown: only the button continues
  if (hadFocus && answer.done) (cards[0] ?? $("hits").lastElementChild)?.querySelector("a").focus();
}

// ---- files and keys

function searchByExample(file) {
  if (!file) return;
  const key = `${file.name}|${file.size}|${file.lastModified}`;
  examples.set(key, file);
  go(stateOfForm({ example: key }));
}

function onKey(event) {
  const typing = event.target.closest("input, video") || $("player").open;
  if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  $("text").select();
}

/** Shows where files can be dropped, and takes them. */
function onDrag(event) {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  const zone = event.target.closest?.(".zone");
  const isOver = event.type === "dragover" || (event.type === "dragleave" && event.relatedTarget !== null);
  if (isOver && !$("drop").matches(":popover-open")) $("drop").showPopover();
  if (!isOver) $("drop").hidePopover();
  for (const one of $("drop").children) one.classList.toggle("over", isOver && one === zone);
  if (event.type !== "drop") return;
  const files = [...event.dataTransfer.files];
  if (zone?.id === "drop-add") addFiles(files);
  else searchByExample(files[0]);
}

/** Goes back in the history. An address that is set before that is done would be left again. */
function goBack() {
  hasGoneBack = new Promise((resolve) => addEventListener("hashchange", resolve, { once: true }));
  history.back();
}

/** Updates the page after the address of an open player was left. */
function afterClose() {
  const state = readState();
  if (!state.has("open")) return;
  if (history.state === "entered") history.replaceState(null, "", addressWith(state));
  else goBack();
}

async function showFacts() {
  try {
    const { segments, files, model } = await loadFacts();
    $("facts").textContent = `${many(segments, "segment")} of ${many(files, "film")} · model ${model}`;
  } catch (error) {
    $("facts").textContent = error.message;
  }
  const sources = availableSources();
  $("sources").hidden = sources.length < 2;
  for (const source of SOURCES) $(`in-${source}`).parentElement.hidden = !sources.includes(source);
  $("tip").hidden = !facts.has_text;
  $("drop-add").hidden = !facts.can_add;
}

/** Shows what has been added: the page's older answers do not have it. */
async function afterAdding() {
  answers.clear();
  await showFacts();
  if (!hasQuery(readState())) showStart();
}

$("form").addEventListener("submit", submit);
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  searchByExample($("file").files[0]);
  $("file").value = ""; // the same file can be chosen again
});
for (const box of $("filters").querySelectorAll("[type=checkbox]")) {
  box.addEventListener("change", submitIfSearching);
}
$("more-button").addEventListener("click", loadMore);
for (const type of ["dragover", "dragleave", "drop"]) document.addEventListener(type, onDrag);
document.addEventListener("keydown", onKey);
window.addEventListener("hashchange", () => {
  fillText();
  render();
});
// A visitor who enters by a link to an open player has no list to go back to when it closes.
if (readState().has("open")) history.replaceState("entered", "");
setUpPlayer(afterClose);
const isReady = showFacts();
isReady.then(() => setUpLibrary(afterAdding));
fillText();
render();
