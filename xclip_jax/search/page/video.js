// The picture of the player: the file; a transcoded preview, if the browser cannot play the file; or
// stills, if there is no preview. All seconds are counted from the file's first frame.

import { $, clock, nameOf, range, reducedMotion, stillOf } from "./dom.js";
import { call } from "./server.js";

const PREVIEW_SECONDS = 59; // the server makes at most 60
const AROUND = 5; // seconds of a preview before and after a moment

const unplayable = new Set(); // paths of files
const NOTHING = { hit: null, kind: "none", zero: 0, start: 0, end: Infinity, second: 0 };
let playing = NOTHING;
let pictured = null; // the second of the still picture, null while a video plays
let onMove = () => {};

/** Sets what is called with each new second. */
export function setUpVideo(callback) {
  onMove = callback;
  for (const type of ["timeupdate", "seeking"]) $("video").addEventListener(type, () => onMove(currentSecond()));
}

/** Plays a hit from `second` on. */
export function startVideo(hit, second = hit.second) {
  const same = playing.hit?.path === hit.path;
  if (same && playing.kind === "file") {
    playing.hit = hit;
    return seek(second, true);
  }
  if (unplayable.has(hit.path)) return startPreview(hit, second);
  play({ hit, kind: "file", zero: hit.offset, start: 0, end: Infinity, second }, `video/${hit.id}`);
}

function play(next, address) {
  const video = $("video");
  playing = next;
  let isReady = false;
  video.onerror = () => !isReady && fail(next);
  video.onloadedmetadata = () => {
    if (!video.videoWidth) return fail(next); // only its sound can be played
    isReady = true;
    pictured = null;
    $("unplayable").hidden = true;
    video.hidden = false;
    video.currentTime = next.second + next.zero; // of the last seek while it was loading
    if (!reducedMotion()) video.play().catch(() => {}); // without permission, the user starts it
  };
  if (next.kind === "file") {
    pictured = null;
    video.hidden = false;
    $("unplayable").hidden = true;
    $("preview-note").hidden = true;
  }
  video.src = address;
}

/** Returns why the server does not send something, or null if it does. */
const reasonOf = (address, headers = {}) => call(address, { headers }).then(() => null, (error) => error.message);

async function fail(failed) {
  if (playing !== failed) return;
  const { hit, kind } = failed;
  if (kind === "file") {
    showPicture(hit, failed.second, "…");
    const reason = await reasonOf(`video/${hit.id}`, { Range: "bytes=0-0" });
    if (playing !== failed) return;
    if (reason) return showStills(hit, failed.second, reason);
    unplayable.add(hit.path);
    return startPreview(hit, failed.second);
  }
  const reason = await reasonOf(previewOf(failed));
  if (playing !== failed) return;
  const why = `This browser cannot play ${nameOf(hit)}, and there is no preview`;
  showStills(hit, failed.second, `${why}${reason ? `: ${reason}` : ""}. Download it to watch it in another player.`);
}

const previewOf = ({ hit, start, end }) => {
  const span = new URLSearchParams({ start: start.toFixed(3), end: end.toFixed(3) });
  return `preview/${hit.id}?${span}`;
};

function startPreview(hit, second) {
  const inside = second >= hit.start && second <= hit.end;
  const from = Math.max(0, (inside ? Math.min(hit.start, hit.segment_start) : second) - AROUND);
  const to = Math.min(hit.duration, (inside ? Math.max(hit.end, hit.segment_end) : second) + AROUND);
  const start = Math.max(from, Math.min(second - AROUND, to - PREVIEW_SECONDS));
  const end = Math.max(start + 0.1, Math.min(to, start + PREVIEW_SECONDS));
  const next = { hit, kind: "preview", zero: -start, start, end, second };
  showPicture(hit, second, `This browser cannot play ${nameOf(hit)}. Preparing a small preview…`);
  $("unplayable").classList.add("loading");
  $("preview-note").hidden = false;
  $("preview-note").textContent = `Small preview of ${range({ start, end })}, without the file's full quality`;
  play(next, previewOf(next));
}

function showPicture(hit, second, why) {
  $("video").pause();
  $("video").hidden = true;
  $("unplayable").hidden = false;
  $("unplayable").classList.remove("loading");
  $("why").textContent = why;
  showStill(hit, second);
}

function showStill(hit, second) {
  pictured = second;
  $("picture").src = stillOf(hit.id, second);
  $("picture").alt = `Still picture at ${clock(second, true)}`;
  onMove(second);
}

function showStills(hit, second, why) {
  playing = { ...playing, kind: "stills" };
  closeVideo();
  $("preview-note").hidden = true;
  showPicture(hit, second, why);
}

function closeVideo() {
  const video = $("video");
  video.onerror = video.onloadedmetadata = null;
  video.removeAttribute("src");
  video.load(); // closes the connection
}

export function stopVideo() {
  playing = NOTHING;
  closeVideo();
}

/** Goes to a second; with `start`, also plays. */
export function seek(second, start = false) {
  const { hit, kind, zero } = playing;
  if (!hit) return;
  if (kind === "stills") {
    showStill(hit, second);
  } else if (kind === "preview" && (second < playing.start || second > playing.end)) {
    startPreview(hit, second);
  } else {
    playing.second = second;
    $("video").currentTime = second + zero;
    if (start && !reducedMotion()) $("video").play().catch(() => {});
  }
}

export const currentSecond = () => pictured ?? $("video").currentTime - playing.zero;
