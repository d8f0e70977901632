// The player: a dialog with the film at the best second of a hit, why it matched, and the heat map.

import { addressWith, FILTERS, replaceAddress } from "./address.js";
import { $, SOURCE_NAMES, clock, isSeen, make, nameOf, quote, range, scoreOf } from "./dom.js";
import { followSecond, showHeatMap } from "./heatmap.js";
import { tagsOf } from "./results.js";
import { makeTimeline, showHead, showMarks } from "./timeline.js";
import { currentSecond, seek, setUpVideo, startVideo, stopVideo } from "./video.js";

let open = null; // the hit
let moments = []; // of its film, by time
let shownState = null;
let isLooping = false;
const timeline = makeTimeline("Moments of this film");

export const openHit = () => open;

/** Shows a hit; `hits` are the results, of which the player offers those of the same film. */
export function openPlayer(hit, hits, state) {
  const isSameFilm = open?.path === hit.path;
  open = hit;
  shownState = state;
  const ofFilm = hits.filter((one) => one.path === hit.path);
  moments = (ofFilm.includes(hit) ? ofFilm : [...ofFilm, hit]).sort((a, b) => a.start - b.start);
  $("player-name").textContent = nameOf(hit);
  $("best").textContent = `${hit.rank ? "Best second" : "Start"}, ${clock(hit.second)}`;
  $("matches").replaceChildren(...matchesOf(hit, state.get("q")));
  $("details").replaceChildren(...detailsOf(hit));
  showMarks(timeline, ofFilm, hit.duration, (one) => addressWith(state, one), hit);
  $("film-end").textContent = clock(hit.duration);
  showMoves();
  showLinks(hit, state);
  if (!$("player").open) $("player").showModal();
  if (!isSameFilm) $("player").scrollTop = 0;
  startVideo(hit);
  showHeatMap(hit, state.get("q"), seek, () => open === hit);
}

function showMoves() {
  const place = moments.indexOf(open);
  $("previous").ariaDisabled = String(place === 0); // keeps the focus, which disabled would not
  $("next").ariaDisabled = String(place === moments.length - 1);
  $("place").textContent = moments.length > 1 ? `Moment ${place + 1} of ${moments.length}` : "";
}

function showLinks(hit, state) {
  const similar = new URLSearchParams({ like: hit.id });
  for (const name of [...FILTERS, "dedupe"]) if (state.get(name)) similar.set(name, state.get(name));
  $("similar").href = `#${similar}`;
  $("download").href = `video/${hit.id}`;
  $("download").download = nameOf(hit);
  const span = new URLSearchParams({ start: hit.start.toFixed(3), end: hit.end.toFixed(3) });
  $("clip").href = `clip/${hit.id}?${span}`;
}

/** Returns why the hit was found, with buttons that go to what is said or written. */
function matchesOf(hit, query) {
  const lines = (hit.matches ?? []).filter((match) => match.text).map((match) => {
    const label = `${SOURCE_NAMES[match.source]} at ${clock(match.start)}`;
    const button = make("button", { type: "button", className: "quiet", textContent: label });
    button.onclick = () => seek(match.start, true);
    return make("p", { className: "quote" }, button, " ", quote(match.text, query));
  });
  return lines;
}

function detailsOf(hit) {
  const path = hit.path.split(/(?<=[/\\])/).flatMap((part) => [part, make("wbr")]);
  const facts = { [hit.rank ? "Moment" : "Segment"]: [range(hit)] };
  const tags = tagsOf(hit);
  if (tags.length) facts.Match = [make("span", { className: "tags" }, ...tags)];
  if (hit.rank) facts.Rank = [hit.rank];
  if (hit.rank && isSeen(hit)) {
    const terms = hit.bias ? ` = ${hit.score.toFixed(2)} − ${hit.bias.toFixed(2)} (bias)` : "";
    facts.Score = [scoreOf(hit) + terms];
  }
  facts.File = path;
  const pair = ([name, value]) => [make("dt", { textContent: name }), make("dd", {}, ...value)];
  return Object.entries(facts).flatMap(pair);
}

/** Opens another moment of the film. The Back button still leaves the player. */
function move(step) {
  const next = moments[moments.indexOf(open) + step];
  if (next) replaceAddress(addressWith(shownState, next));
}

function setLooping(on) {
  isLooping = on;
  $("loop").ariaPressed = String(on);
  if (on) {
    if (currentSecond() < open.start || currentSecond() >= open.end) seek(open.start, true);
    requestAnimationFrame(loop);
  }
}

function loop() {
  if (!isLooping || !open) return;
  const video = $("video");
  const isAtEnd = video.ended || currentSecond() >= open.end;
  if (isAtEnd && !video.hidden && !video.seeking && video.readyState) seek(open.start, true);
  requestAnimationFrame(loop);
}

function follow(second) {
  if (!open) return;
  followSecond(second);
  showHead(timeline, second / open.duration);
  $("film-now").textContent = clock(Math.max(0, second));
}

function seekOnTimeline({ target, clientX }) {
  if (target.closest(".mark")) return;
  const { left, width } = timeline.getBoundingClientRect();
  seek((open.duration * (clientX - left)) / width);
}

/** Closes the dialog; `afterClose` is called whenever it has closed. */
export const closePlayer = () => $("player").close();

export function setUpPlayer(afterClose) {
  $("film-line").append(timeline);
  timeline.addEventListener("click", seekOnTimeline);
  // A moment of the same film replaces the one in the address: the Back button leaves the player.
  timeline.addEventListener("click", (event) => {
    const mark = event.target.closest(".mark");
    if (!mark || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    replaceAddress(mark.href);
  });
  $("best").onclick = () => seek(open.second, true);
  $("loop").onclick = () => setLooping(!isLooping);
  $("previous").onclick = () => move(-1);
  $("next").onclick = () => move(1);
  $("close").onclick = closePlayer;
  $("player").addEventListener("click", ({ target }) => target === $("player") && closePlayer());
  $("player").addEventListener("close", () => {
    stopVideo();
    setLooping(false);
    open = null;
    afterClose();
  });
  setUpVideo(follow);
}
