// The heat map of a segment: similarities of the sentence and of its words to the frames.

import { $, clock, make, stillOf } from "./dom.js";
import { post } from "./server.js";
import { loadStills } from "./stills.js";

const OF_WORDS = "Cosine similarity of the sentence, smoothed, and of each word to each frame. ";
const OF_SENTENCE = "Cosine similarity of the sentence to each frame, smoothed. ";
const CHOICE = "The stronger the colour, the higher the value. Choose a frame to go to its time.";

/** Shows the heat map; `isCurrent` returns true while the player shows this hit. */
export async function showHeatMap(hit, sentence, seek, isCurrent) {
  $("heat-map").hidden = !sentence;
  $("heat").replaceChildren();
  $("heat").hidden = true;
  if (!sentence) return;
  $("heat-note").textContent = "Comparing the sentence with the frames…";
  let map;
  try {
    map = await post(`api/heat_map/${hit.id}`, { text: sentence });
  } catch (error) {
    if (isCurrent()) $("heat-note").textContent = error.message;
    return;
  }
  if (!isCurrent()) return;
  $("heat-note").textContent = (map.words.length ? OF_WORDS : OF_SENTENCE) + CHOICE;
  const table = tableOf(map, hit, seek);
  $("heat").hidden = false;
  $("heat").replaceChildren(table);
  const best = table.querySelector("th.best");
  $("heat").scrollLeft = best.offsetLeft - $("heat").clientWidth / 2;
  loadStills([...table.querySelectorAll("img")]);
}

function tableOf({ words, times, words_by_frames: values, sentence }, hit, seek) {
  const best = sentence.indexOf(Math.max(...sentence));
  const heads = times.map((time, frame) => headOf(hit, time, frame, frame === best));
  const corner = make("td", {}, make("span", { className: "spoken", textContent: "Words" }));
  const head = make("thead", {}, make("tr", {}, corner, ...heads));
  const body = make("tbody", {}, rowOf("sentence", sentence, times, best, scaleOf(sentence)));
  body.firstChild.className = "whole";
  const scale = scaleOf(values.flat());
  body.append(...words.map((word, w) => rowOf(word, values[w], times, best, scale)));
  const table = make("table", {}, head, body);
  table.style.setProperty("--frames", times.length);
  table.onclick = ({ target }) => {
    const cell = target.closest("[data-frame]");
    if (cell) seek(times[cell.dataset.frame]);
  };
  return table;
}

/** Returns a function of a value to its place between the lowest and the highest, 0 to 1. */
function scaleOf(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return (value) => (high > low ? (value - low) / (high - low) : 1);
}

function headOf(hit, time, frame, isBest) {
  const image = make("img", { alt: "" });
  image.dataset.still = stillOf(hit.id, time);
  const button = make("button", { type: "button" });
  const mark = make("span", { className: "mark-best", textContent: isBest ? "best" : "" });
  button.append(make("span", { className: "spoken", textContent: "Go to " }), mark, image, clock(time, true));
  button.dataset.time = time;
  const head = make("th", { scope: "col", className: isBest ? "best" : "" }, button);
  head.dataset.frame = frame;
  return head;
}

function rowOf(name, values, times, best, scale) {
  const text = make("span", { dir: "auto", textContent: name, title: name });
  const cells = values.map((value, frame) => {
    const title = `${name}, ${clock(times[frame], true)}: ${value.toFixed(2)}`;
    const cell = make("td", { title, textContent: value.toFixed(2) });
    if (frame === best) cell.className = "best";
    cell.dataset.frame = frame;
    cell.style.setProperty("--heat", scale(value).toFixed(3));
    return cell;
  });
  return make("tr", {}, make("th", { scope: "row" }, text), ...cells);
}

/** Marks the frame of the heat map at `second`. */
export function followSecond(second) {
  const buttons = [...$("heat").querySelectorAll("button")];
  const now = buttons.findLast((button) => button.dataset.time <= second + 0.05);
  for (const button of buttons) button.classList.toggle("now", button === now);
}
