// The state of the page (the query, its filters, the open player) is the part of the address after
// the '#', so it can be shared and the Back button works.

export const FILTERS = ["path", "start", "end"];

export const readState = () => new URLSearchParams(location.hash.slice(1));
export const hasQuery = (state) => ["q", "like", "example"].some((name) => state.has(name));

/** Returns the address of a search, with the player open at `hit` if there is one. */
export function addressWith(state, hit = null) {
  const changed = new URLSearchParams(state);
  changed.delete("open");
  changed.delete("at");
  if (hit) {
    changed.set("open", hit.id);
    changed.set("at", String(Number(hit.second.toFixed(2))));
  }
  return `#${changed}`;
}

export const searchKey = (state) => addressWith(state);

/** Changes the address without a new entry in the history. */
export function replaceAddress(address) {
  history.replaceState(history.state, "", address);
  dispatchEvent(new HashChangeEvent("hashchange"));
}
