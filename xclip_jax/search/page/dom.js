// Helpers of all modules. File names and sentences are untrusted: they are only inserted as text.

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** 83.5 -> "1:23"; with `exact`, "1:23.5". */
export function clock(seconds, exact = false) {
  const tenths = exact ? Math.round(seconds * 10) : Math.floor(seconds + 1e-6) * 10;
  const whole = Math.floor(tenths / 10);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  const two = (number) => String(number).padStart(2, "0");
  const head = hours ? `${hours}:${two(minutes)}` : `${minutes}`;
  const fraction = tenths % 10 ? `.${tenths % 10}` : "";
  return `${head}:${two(whole % 60)}${fraction}`;
}

/** Returns "0:08 – 0:16", with tenths of seconds if both ends would look the same. */
export function range({ start, end }) {
  const exact = clock(start) === clock(end);
  return `${clock(start, exact)} – ${clock(end, exact)}`;
}

export const many = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
export const stillOf = (id, second) => `still/${id}?second=${second.toFixed(3)}`;
export const nameOf = (hit) => hit.name ?? hit.path.split(/[/\\]/).pop();
export const reducedMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Returns what decides the rank: the score minus, in an index with a bank of captions, the bias. */
export const scoreOf = (hit) => (hit.score - (hit.bias ?? 0)).toFixed(2);

/** Returns true if the score of the pictures says why a hit was found. */
export const isSeen = ({ score, matches = [] }) =>
  score !== null && (!matches.length || matches.some(({ source }) => source === "picture"));

export const SOURCE_NAMES = { picture: "seen", speech: "said", text: "written" };

const UNMARKED = new Set(["the", "and", "with", "for", "from", "that", "this", "are", "was", "his", "her"]);

/** Returns the quoted lines of a match, where the longer words of the query are marked. */
export function quote(text, query) {
  const words = (query ?? "").toLowerCase().match(/[\p{L}\p{N}]{3,}/gu) ?? [];
  const wanted = new Set(words.filter((word) => !UNMARKED.has(word)));
  const parts = text.split(/([\p{L}\p{N}]+)/u);
  const node = (part) =>
    wanted.has(part.toLowerCase()) ? make("mark", { textContent: part }) : part;
  return make("q", { dir: "auto" }, ...parts.map(node));
}
