// Requests to the server.

import { FILTERS } from "./address.js";

export const PAGE_SIZE = 24;
const EXAMPLE_PAGE_SIZE = 100; // each page of an example sends its file again
const MAX_HITS = 1000;

/** Facts about the index, which `loadFacts` reads. */
export const facts = {
  max_upload_bytes: Infinity,
  sources: ["picture"],
  examples: [],
  can_add: false,
  has_text: false,
  dedupe: false,
};

export const loadFacts = async () => Object.assign(facts, await call("api/index"));

export async function call(address, options = {}) {
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

export function post(address, fields, signal) {
  const headers = { "Content-Type": "application/json" };
  return call(address, { method: "POST", headers, body: JSON.stringify(fields), signal });
}

/** Returns the hit of a segment. */
export const fetchSegment = (id) => call(`api/segment/${encodeURIComponent(id)}`);

/** Returns true if near-duplicates are folded: as the address says, or else as the server was started. */
export const isFolding = (state) => (state.has("dedupe") ? state.get("dedupe") === "1" : facts.dedupe);

const sizeOfPage = (state, offset) =>
  Math.min(state.has("example") ? EXAMPLE_PAGE_SIZE : PAGE_SIZE, MAX_HITS - offset);

/**
 * Returns the answer to a query from `offset` on. Its field `done` says that there are no more hits.
 * `examples` holds the files that were chosen on this page, by their key in the address.
 */
export async function requestAnswer(state, offset, examples, signal) {
  const k = sizeOfPage(state, offset);
  const names = FILTERS.filter((name) => state.get(name));
  const fields = Object.fromEntries(names.map((name) => [name, state.get(name)]));
  Object.assign(fields, { k, offset, dedupe: isFolding(state) });
  const answer = await request(state, fields, examples, signal);
  answer.done = answer.hits.length < k || offset + k >= MAX_HITS;
  return answer;
}

function request(state, fields, examples, signal) {
  if (state.has("example")) return requestByExample(examples.get(state.get("example")), fields, signal);
  if (state.has("like")) {
    const id = encodeURIComponent(state.get("like"));
    return call(`api/like/${id}?${new URLSearchParams(fields)}`, { signal });
  }
  const sources = state.get("in")?.split(",") ?? null;
  return post("api/search", { text: state.get("q"), ...fields, sources }, signal);
}

async function requestByExample(file, fields, signal) {
  if (!file) throw new Error("Reloading the page discards files: choose the example again.");
  refuseLargeFile(file);
  const options = new URLSearchParams({ name: file.name, ...fields });
  return call(`api/example?${options}`, { method: "POST", body: file, signal });
}

export function refuseLargeFile(file) {
  if (file.size <= facts.max_upload_bytes) return;
  throw new Error(`${file.name} is larger than ${Math.round(facts.max_upload_bytes / 2 ** 20)} MB.`);
}

/** Sends a file to the library and returns the name that it got. */
export function sendToLibrary(file, onProgress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not report the progress of uploads
    request.open("POST", `api/add?${new URLSearchParams({ name: file.name })}`);
    request.responseType = "json";
    request.upload.onprogress = ({ loaded, total }) => onProgress(total ? loaded / total : 0);
    request.onerror = () => reject(new Error("The connection was lost: add the file again."));
    request.onload = () => {
      if (request.status < 300) return resolve(request.response?.name ?? file.name);
      reject(new Error(request.response?.error ?? `The server returned an error (${request.status}).`));
    };
    request.send(file);
  });
}
