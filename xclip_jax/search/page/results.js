// The results, grouped by film: a card for each, in the order of its best moment.

import { addressWith } from "./address.js";
import { $, SOURCE_NAMES, clock, isSeen, make, many, nameOf, quote, range, scoreOf, stillOf } from "./dom.js";
import { facts } from "./server.js";
import { loadStills, makeScrubbable } from "./stills.js";
import { makeTimeline, showHead, showMarks } from "./timeline.js";

const INITIAL_MOMENTS = 2; // of a card

let films = new Map(); // by path

export const countFilms = () => films.size;

/** Replaces the results. */
export function showHits(hits, state) {
  films = new Map();
  $("hits").replaceChildren();
  addHits(hits, state);
}

/**
 * Adds further results: new films at the end, further moments of a film to its card, whose height
 * stays. Returns the new cards.
 */
export function addHits(hits, state) {
  const [added, changed] = [[], new Set()];
  for (const hit of hits) {
    let film = films.get(hit.path);
    if (!film) {
      films.set(hit.path, (film = { hits: [], visible: 0, isNew: true }));
      added.push(film);
    }
    film.hits.push(hit);
    changed.add(film);
  }
  for (const film of changed) {
    if (film.isNew) makeCard(film, state);
    film.isNew = false;
    update(film, state);
  }
  $("hits").append(...added.map((film) => film.card));
  loadStills(added.map((film) => film.image));
  return added.map((film) => film.card);
}

/** Returns the hit of an address, one of the results or folded into one, or undefined. */
export function findHit(hits, id, second) {
  const all = hits.flatMap((hit) => [hit, ...(hit.duplicates ?? [])]).filter((hit) => hit.id === id);
  return all.find((hit) => Math.abs(hit.second - second) < 0.006) ?? (second === null ? all[0] : undefined);
}

function makeCard(film, state) {
  const best = film.hits[0];
  const name = nameOf(best);
  const href = addressWith(state, best);
  film.visible = Math.min(film.hits.length, INITIAL_MOMENTS);
  film.image = make("img", { src: `thumbnail/${best.id}`, alt: "" });
  film.image.dataset.still = stillOf(best.id, best.second);
  const time = make("span", { className: "time", textContent: clock(best.second) });
  const picture = make("a", { className: "picture", href }, film.image, time);
  picture.ariaLabel = `${name}, best moment at ${clock(best.second)}`;
  film.timeline = makeTimeline(`Moments of ${name}`);
  const show = makeScrubbable(picture, best, (share) => showHead(film.timeline, share));
  const link = make("a", { href, tabIndex: -1, dir: "auto", textContent: name, title: best.path });
  film.meta = make("p", { className: "meta" });
  film.list = make("ul", { className: "moments" });
  film.more = make("button", { type: "button", className: "quiet", onclick: () => toggle(film, state) });
  const title = make("h2", {}, link);
  const words = make("div", { className: "words" }, title, film.meta, film.list, film.more);
  film.card = make("li", { className: "film" }, picture, film.timeline, words);
  showPointedMoments(film.card, show);
}

/** Shows the picture of the moment that the pointer or the focus is at. */
function showPointedMoments(card, show) {
  const secondOf = ({ target }) => target.closest("[data-second]")?.dataset.second;
  const onEnter = (event) => {
    const second = secondOf(event);
    if (second && event.pointerType !== "touch") show(Number(second));
  };
  const onLeave = (event) => secondOf(event) && show(null);
  for (const type of ["pointerover", "focusin"]) card.addEventListener(type, onEnter);
  for (const type of ["pointerout", "focusout"]) card.addEventListener(type, onLeave);
}

function update(film, state) {
  const { hits, visible, list } = film;
  film.meta.textContent = `${many(hits.length, "moment")} · film of ${clock(hits[0].duration)}`;
  showMarks(film.timeline, hits, hits[0].duration, (hit) => addressWith(state, hit));
  while (list.children.length > visible) list.lastChild.remove();
  list.append(...hits.slice(list.children.length, visible).map((hit) => momentOf(hit, state)));
  const hidden = hits.length - visible;
  film.more.textContent = hidden ? `Show ${many(hidden, "more moment")}` : "Show fewer moments";
  film.more.ariaLabel = `${film.more.textContent} of ${nameOf(hits[0])}`;
  film.more.ariaExpanded = String(!hidden);
  film.more.classList.toggle("unused", !hidden && visible <= INITIAL_MOMENTS); // keeps its place
}

function toggle(film, state) {
  const all = film.hits.length;
  film.visible = film.visible < all ? all : Math.min(all, INITIAL_MOMENTS);
  update(film, state);
}

function momentOf(hit, state) {
  const when = make("span", { className: "when", textContent: range(hit) });
  const link = make("a", { className: "moment", href: addressWith(state, hit) }, when);
  link.dataset.second = hit.second;
  link.append(...tagsOf(hit));
  if (isSeen(hit)) {
    const score = make("span", { className: "score", title: "Score" });
    link.append(make("span", { className: "spoken", textContent: "score " }), score);
    score.textContent = scoreOf(hit);
  }
  return make("li", {}, link, ...quotesOf(hit, state.get("q")), ...duplicatesOf(hit, state));
}

/** Returns in which sources a hit was found, if the index has several, and a mark if it is weak. */
export function tagsOf(hit) {
  const names = facts.sources.length > 1 ? (hit.matches ?? []).map((m) => SOURCE_NAMES[m.source]) : [];
  const tags = [...new Set(names)].map((textContent) => make("span", { className: "tag", textContent }));
  if (hit.weak) tags.push(make("span", { className: "tag weak", textContent: "weak match" }));
  return tags;
}

function quotesOf(hit, query) {
  const quoted = (hit.matches ?? []).filter((match) => match.text);
  const source = (match) => make("span", { className: "spoken", textContent: `${SOURCE_NAMES[match.source]}: ` });
  return quoted.map((match) => make("p", { className: "quote" }, source(match), quote(match.text, query)));
}

function duplicatesOf(hit, state) {
  const folded = hit.duplicates ?? [];
  if (!folded.length) return [];
  const item = (one) => {
    const name = make("span", { dir: "auto", textContent: nameOf(one) });
    const link = make("a", { href: addressWith(state, one), title: one.path }, name, ` ${range(one)}`);
    return make("li", {}, link);
  };
  const textContent = many(folded.length, "near-duplicate");
  const list = make("ul", {}, ...folded.map(item));
  return [make("details", { className: "duplicates" }, make("summary", { textContent }), list)];
}
