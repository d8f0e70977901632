// The search page. Its state (the query, the open player) is the part of the address after the '#', so
// it can be shared and the Back button works. File names and sentences are untrusted: they are only
// inserted as text, never as HTML.

const $ = (id) => document.getElementById(id);
const FILTERS = ["path", "start", "end"];
const CACHED_ANSWERS = 20;
const PARALLEL_STILLS = 3; // browsers open 6 connections: some stay free for the next query

const examples = new Map(); // example files by their key in the address
const answers = new Map(); // for the Back button
let shown = { key: null, hits: [], open: null };
let running = new AbortController();
let limits = { max_upload_bytes: Infinity };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** 83.5 -> "1:23"; with `exact`, "1:23.5". */
function clock(seconds, exact = false) {
  const tenths = exact ? Math.round(seconds * 10) : Math.floor(seconds + 1e-6) * 10;
  const whole = Math.floor(tenths / 10);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  const two = (number) => String(number).padStart(2, "0");
  const head = hours ? `${hours}:${two(minutes)}` : `${minutes}`;
  const fraction = tenths % 10 ? `.${tenths % 10}` : "";
  return `${head}:${two(whole % 60)}${fraction}`;
}

const range = (segment) => `${clock(segment.start)} – ${clock(segment.end)}`;
const many = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const stillOf = (id, second) => `still/${id}?second=${second.toFixed(3)}`;

// ---- the address

const readState = () => new URLSearchParams(location.hash.slice(1));

function addressWith(state, open) {
  const changed = new URLSearchParams(state);
  changed.delete("open");
  if (open) changed.set("open", open);
  return `#${changed}`;
}

const searchKey = (state) => addressWith(state, null);

function go(state) {
  const key = searchKey(state);
  answers.delete(key);
  if (key === location.hash) {
    shown.key = null;
    render();
  } else {
    location.hash = key;
  }
}

/** Returns the state of a query with the options of the form. */
function stateOfForm(query) {
  const state = new URLSearchParams(query);
  for (const name of [...FILTERS, "k"]) {
    const value = $(name).value.trim();
    if (value) state.set(name, value);
  }
  return state;
}

function fillForm(state) {
  $("text").value = state.get("q") ?? "";
  for (const name of [...FILTERS, "k"]) $(name).value = state.get(name) ?? "";
  if (FILTERS.some((name) => state.get(name))) $("filters").open = true;
}

// ---- the server

async function call(address, options = {}) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not respond. Is it still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? `The server returned an error (${response.status}).`);
  return answer;
}

const post = (address, fields, signal) =>
  call(address, { method: "POST", body: JSON.stringify(fields), signal });

function requestAnswer(state, signal) {
  const names = ["k", ...FILTERS].filter((name) => state.get(name));
  const fields = Object.fromEntries(names.map((name) => [name, state.get(name)]));
  if (state.has("example")) return requestByExample(state.get("example"), fields, signal);
  if (!state.has("like")) return post("api/search", { text: state.get("q"), ...fields }, signal);
  const id = encodeURIComponent(state.get("like"));
  return call(`api/like/${id}?${new URLSearchParams(fields)}`, { signal });
}

async function requestByExample(key, fields, signal) {
  const file = examples.get(key);
  if (!file) throw new Error("Reloading the page discards files: choose the example again.");
  if (file.size > limits.max_upload_bytes) {
    throw new Error(`${file.name} is larger than ${Math.round(limits.max_upload_bytes / 2 ** 20)} MB.`);
  }
  const options = new URLSearchParams({ name: file.name, ...fields });
  return call(`api/example?${options}`, { method: "POST", body: file, signal });
}

// ---- searching

/** Updates the page to the state in the address. */
async function render() {
  const state = readState();
  const key = searchKey(state);
  if (key !== shown.key) {
    fillForm(state);
    if (!(await search(state, key))) return;
  }
  const hit = shown.hits.find((one) => one.id === state.get("open"));
  if (!hit) $("player").close();
  else if (shown.open !== hit) openPlayer(hit, state);
}

/** Searches and shows the answer; returns false if another search has replaced this one. */
async function search(state, key) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  const hasQuery = ["q", "like", "example"].some((name) => state.has(name));
  $("main").ariaBusy = "true";
  try {
    const answer = !hasQuery ? null : (answers.get(key) ?? (await requestAnswer(state, signal)));
    if (signal.aborted) return false;
    if (answer) cache(key, answer);
    showAnswer(answer, state);
  } catch (error) {
    if (signal.aborted) return false;
    showAnswer(null, state, error.message);
  }
  shown.key = key;
  $("main").ariaBusy = "false";
  return true;
}

function cache(key, answer) {
  answers.delete(key);
  answers.set(key, answer);
  if (answers.size > CACHED_ANSWERS) answers.delete(answers.keys().next().value);
}

function showAnswer(answer, state, error = "") {
  shown = { key: null, hits: answer?.hits ?? [], open: null };
  const title = state.get("q") || state.get("example")?.split("|")[0];
  document.title = title ? `${title} – Video search` : "Video search";
  $("error").textContent = error;
  $("error").hidden = !error;
  showExample(answer, state);
  $("status").replaceChildren(...(answer ? statusOf(answer) : []));
  $("hits").replaceChildren(...shown.hits.map((hit) => card(hit, state)));
  showEmpty(answer, error);
  loadStills([...$("hits").querySelectorAll("img")]);
}

function statusOf(answer) {
  const milliseconds = Math.max(1, Math.round(answer.seconds * 1000)).toLocaleString("en");
  const stage = ([name, seconds]) => `${name} ${(seconds * 1000).toFixed(1)} ms`;
  const title = Object.entries(answer.stages).map(stage).join("\n");
  const textContent = `${many(answer.searched, "segment")} in ${milliseconds} ms`;
  const note = make("span", { className: "note", textContent: answer.note ?? "" });
  return [make("span", { title, textContent }), note];
}

/** Shows the example that was searched by: a segment of the index, or a file with its picture. */
function showExample(answer, state) {
  const [file, segment] = [examples.get(state.get("example")), answer?.like];
  $("example").hidden = !(file || segment);
  if (!file && !segment) return $("example").replaceChildren();
  const name = make("b", { dir: "auto", textContent: segment?.name ?? file.name });
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

/** Shows instructions if there are no hits. */
function showEmpty(answer, error) {
  const [head, text] = answer
    ? ["No results", "No segment passes the filters: change the file name or the seconds."]
    : [
        "Find the moment",
        "Describe what happens in a sentence, or drop an image or a video here to find similar ones.",
      ];
  const needed = !error && !answer?.hits.length;
  const hint = [make("h2", { textContent: head }), make("p", { textContent: text })];
  $("empty").replaceChildren(...(needed ? hint : []));
  $("empty").hidden = !needed;
}

/** Returns what decides the rank: the score minus, in an index with a bank of captions, the bias. */
function scoreOf(hit) {
  return (hit.score - (hit.bias ?? 0)).toFixed(2);
}

function card(hit, state) {
  const image = make("img", { src: `thumbnail/${hit.id}`, alt: "" });
  image.dataset.still = stillOf(hit.id, hit.second);
  const rank = make("span", { className: "rank", textContent: hit.rank });
  const best = make("span", { className: "time", textContent: clock(hit.second) });
  const name = make("b", { dir: "auto", textContent: hit.name });
  const times = make("span", { textContent: range(hit) });
  const scored = make("i", { textContent: "score " });
  const score = make("span", { className: "score" }, scored, scoreOf(hit));
  const picture = make("div", { className: "picture" }, image, rank, best);
  const label = `${hit.rank}. ${hit.name} at ${clock(hit.second)}, score ${scoreOf(hit)}`;
  const link = make("a", { href: addressWith(state, hit.id), title: hit.path, ariaLabel: label });
  link.append(picture, name, make("div", { className: "line" }, times, score));
  return make("li", {}, link);
}

/** Replaces thumbnails by the exact stills, a few at a time, if they are still on the page. */
function loadStills(images) {
  const worker = async () => {
    for (let image; (image = images.shift()); ) if (image.isConnected) await loadStill(image);
  };
  for (let k = 0; k < PARALLEL_STILLS; k++) worker();
}

function loadStill(image) {
  return new Promise((done) => {
    const still = new Image();
    still.onload = () => done((image.src = still.src));
    still.onerror = done;
    still.src = image.dataset.still;
  });
}

// ---- the player

function openPlayer(hit, state) {
  shown.open = hit;
  $("player-name").textContent = hit.name;
  $("details").replaceChildren(...detailsOf(hit));
  $("best").textContent = `Best second, ${clock(hit.second)}`;
  $("best").onclick = () => seek(hit.second);
  $("similar").href = `#${stateOfForm({ like: hit.id })}`;
  $("download").href = `video/${hit.id}`;
  $("download").download = hit.name;
  if (!$("player").open) $("player").showModal();
  $("player").scrollTop = 0;
  startVideo(hit);
  showAttention(hit, state.get("q"));
}

function detailsOf(hit) {
  const path = hit.path.split(/(?<=[/\\])/).flatMap((part) => [part, make("wbr")]);
  const terms = hit.bias ? ` = ${hit.score.toFixed(2)} − ${hit.bias.toFixed(2)} (bias)` : "";
  const score = [scoreOf(hit) + terms];
  const facts = { Rank: [hit.rank], Score: score, Segment: [range(hit)], File: path };
  const pair = ([name, value]) => [make("dt", { textContent: name }), make("dd", {}, ...value)];
  return Object.entries(facts).flatMap(pair);
}

function startVideo(hit) {
  const video = $("video");
  $("unplayable").hidden = true;
  video.hidden = false;
  video.onerror = () => cannotPlay(hit);
  video.onloadedmetadata = () => {
    if (!video.videoWidth) return cannotPlay(hit); // only its sound can be played
    video.currentTime = hit.second + hit.offset;
    video.play().catch(() => {}); // without permission to autoplay, the user starts it
  };
  video.src = `video/${hit.id}`;
}

async function cannotPlay(hit) {
  stopVideo();
  $("video").hidden = true;
  $("unplayable").hidden = false;
  $("picture").src = stillOf(hit.id, hit.second);
  $("why").textContent = `This browser cannot play ${hit.name}. Download it to watch it in another player.`;
  const first = { headers: { Range: "bytes=0-0" } };
  await call(`video/${hit.id}`, first).catch((error) => ($("why").textContent = error.message));
}

function stopVideo() {
  const video = $("video");
  video.onerror = video.onloadedmetadata = null;
  video.removeAttribute("src");
  video.load(); // closes the connection
}

function seek(second) {
  if (!$("video").hidden) $("video").currentTime = second + shown.open.offset;
  else $("picture").src = stillOf(shown.open.id, second);
}

/** Updates the address after the dialog has closed. */
function afterClose() {
  stopVideo();
  shown.open = null;
  const state = readState();
  if (!state.has("open")) return;
  if (history.state === "entered") history.replaceState(null, "", addressWith(state, null));
  else history.back();
}

// ---- the heat map

const LEGEND =
  "Attention of each word to each frame: the stronger the colour, the higher the weight. " +
  "Bars: sum over a word or a frame. Click a frame to go to its time.";

async function showAttention(hit, sentence) {
  $("attention").hidden = !sentence;
  $("heat").replaceChildren();
  if (!sentence) return;
  $("attention-note").textContent = "…";
  const attention = post(`api/attention/${hit.id}`, { text: sentence });
  const note = await attention.then(() => LEGEND, (error) => error.message);
  if (shown.open !== hit) return;
  $("attention-note").textContent = note;
  if (note === LEGEND) showHeatMap(await attention, hit);
}

function showHeatMap(attention, hit) {
  const table = heatMap(attention, hit);
  $("heat").replaceChildren(table);
  const best = table.querySelector(".best");
  $("heat").scrollLeft = best.offsetLeft - $("heat").clientWidth / 2;
  loadStills([...table.querySelectorAll("img")]);
}

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

function heatMap({ words, times, weights }, hit) {
  const ofWords = weights.map(sum);
  const ofFrames = times.map((_, frame) => sum(weights.map((row) => row[frame])));
  const [maxWord, maxFrame, maxWeight] = [ofWords, ofFrames, weights.flat()].map((all) => Math.max(...all));
  const heads = times.map((time, f) => frameHead(hit, time, f, ofFrames[f], maxFrame));
  const row = (word, w) => {
    const title = (f) => `${word}, ${clock(times[f], true)}: ${percent(weights[w][f])}`;
    const cells = weights[w].map((weight, f) => heatCell(weight / maxWeight, f, title(f)));
    return make("tr", {}, wordHead(word, ofWords[w], maxWord), ...cells);
  };
  const head = make("thead", {}, make("tr", {}, make("td"), ...heads));
  const table = make("table", {}, head, make("tbody", {}, ...words.map(row)));
  table.style.setProperty("--frames", times.length);
  table.onclick = ({ target }) => {
    const cell = target.closest("[data-frame]");
    if (cell) seek(times[cell.dataset.frame]);
  };
  return table;
}

const percent = (share) => `${(share * 100).toFixed(1)} %`;

function bar(share, largest) {
  const element = make("i", { className: "bar", title: `${percent(share)} of the attention` });
  element.style.setProperty("--filled", `${(100 * share) / largest}%`);
  return element;
}

function frameHead(hit, time, frame, share, largest) {
  const image = make("img", { alt: "" });
  image.dataset.still = stillOf(hit.id, time);
  const ariaLabel = `Go to ${clock(time, true)}, ${percent(share)} of the attention`;
  const button = make("button", { type: "button", ariaLabel });
  button.append(image, clock(time, true), bar(share, largest));
  button.dataset.time = time;
  const head = make("th", { scope: "col", className: share === largest ? "best" : "" }, button);
  head.dataset.frame = frame;
  return head;
}

function wordHead(word, share, largest) {
  const text = make("span", { dir: "auto", textContent: word, title: word });
  return make("th", { scope: "row" }, make("div", {}, text, bar(share, largest)));
}

function heatCell(strength, frame, title) {
  const cell = make("td", { title });
  cell.dataset.frame = frame;
  cell.style.setProperty("--heat", `${(100 * strength).toFixed(1)}%`);
  return cell;
}

/** Marks the frame of the heat map at the current time of the video. */
function followVideo() {
  const buttons = [...$("heat").querySelectorAll("button")];
  const second = $("video").currentTime - (shown.open?.offset ?? 0);
  const now = buttons.findLast((button) => button.dataset.time <= second + 0.05);
  for (const button of buttons) button.classList.toggle("now", button === now);
}

// ---- user actions

function searchByExample(file) {
  if (!file) return;
  const key = `${file.name}|${file.size}|${file.lastModified}`;
  examples.set(key, file);
  go(stateOfForm({ example: key }));
}

function submit(event) {
  event.preventDefault();
  const sentence = $("text").value.trim();
  if (sentence) return go(stateOfForm({ q: sentence }));
  running.abort();
  shown.key = null;
  showAnswer(null, new URLSearchParams(), "Type a few words that describe the video.");
  $("main").ariaBusy = "false";
  $("text").focus();
}

function onKey(event) {
  const typing = event.target.closest("input, video") || $("player").open;
  if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  $("text").select();
}

function onDrop(event) {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.toggle("dropping", event.type === "dragover");
  if (event.type === "drop") searchByExample(event.dataTransfer.files[0]);
}

async function showFacts() {
  try {
    limits = await call("api/index");
    const { segments, files, model } = limits;
    $("facts").textContent = `${many(segments, "segment")} of ${many(files, "file")} · model ${model}`;
  } catch (error) {
    $("facts").textContent = error.message;
  }
}

$("form").addEventListener("submit", submit);
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  searchByExample($("file").files[0]);
  $("file").value = ""; // the same file can be chosen again
});
$("close").addEventListener("click", () => $("player").close());
$("player").addEventListener("close", afterClose);
$("player").addEventListener("click", ({ target }) => target === $("player") && $("player").close());
$("video").addEventListener("timeupdate", followVideo);
$("video").addEventListener("seeking", followVideo);
for (const type of ["dragover", "dragleave", "drop"]) document.addEventListener(type, onDrop);
document.addEventListener("keydown", onKey);
window.addEventListener("hashchange", render);
// A visitor who enters by a link to an open player has no list to go back to when it closes.
if (readState().has("open")) history.replaceState("entered", "");
showFacts();
render();
