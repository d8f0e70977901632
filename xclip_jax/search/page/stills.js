// Still pictures, a few at a time, and scrubbing: the picture of a card shows the film at the pointer.

import { clock, stillOf } from "./dom.js";

const PARALLEL = 3; // browsers open 6 connections: some stay free for the next query
const POSITIONS = 10; // of scrubbing

const waiting = [];
let running = 0;

/** Loads a picture if it is still `wanted` when its turn comes; returns true if it is there. */
export function loadStill(address, wanted, urgent = false) {
  return new Promise((done) => {
    waiting[urgent ? "unshift" : "push"]({ address, wanted, done });
    start();
  });
}

function start() {
  while (running < PARALLEL && waiting.length) {
    const { address, wanted, done } = waiting.shift();
    if (!wanted()) {
      done(false);
      continue;
    }
    running++;
    const still = new Image();
    const end = (loaded) => {
      running--;
      done(loaded);
      start();
    };
    still.onload = () => end(true);
    still.onerror = () => end(false);
    still.src = address;
  }
}

/** Replaces thumbnails by the exact stills, if they are still on the page. */
export function loadStills(images) {
  for (const image of images) {
    const { still } = image.dataset;
    const wanted = () => image.isConnected && image.dataset.still === still;
    loadStill(still, wanted).then((loaded) => loaded && wanted() && (image.src = still));
  }
}

/**
 * Lets the pointer and the arrow keys move through a film on its picture, and returns a function that
 * shows the film at a second, or the picture at rest for null.
 *
 * `link` holds an `img` with `data-still`, its picture at rest, and `.time`; `onMove` gets the share
 * of the film that is shown, or null at rest.
 */
export function makeScrubbable(link, { id, duration, second: atRest }, onMove) {
  const [image, time] = [link.querySelector("img"), link.querySelector(".time")];
  let shown = null; // the second
  async function show(second) {
    if (second === shown) return;
    shown = second;
    onMove(second === null ? null : second / duration);
    time.textContent = clock(second ?? atRest);
    const address = second === null ? image.dataset.still : stillOf(id, second);
    const wanted = () => shown === second && image.isConnected;
    if ((await loadStill(address, wanted, true)) && wanted()) image.src = address;
  }
  const showPlace = (place) => {
    const inside = Math.min(POSITIONS - 1, Math.max(0, place));
    show((duration * (inside + 0.5)) / POSITIONS);
  };
  link.addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch") return;
    const { left, width } = link.getBoundingClientRect();
    showPlace(Math.floor((POSITIONS * (event.clientX - left)) / width));
  });
  link.addEventListener("pointerleave", () => show(null));
  link.addEventListener("blur", () => show(null));
  link.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    showPlace(Math.round((POSITIONS * (shown ?? atRest)) / duration - 0.5) + step);
  });
  return show;
}
