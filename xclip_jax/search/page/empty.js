// The page without results: examples to try and recent films, or why nothing was found.

import { $, clock, make } from "./dom.js";
import { call, facts } from "./server.js";

const RECENT_FILMS = 8;

let latest = 0;

/** Hides the page without results. */
export function hideEmpty() {
  latest++;
  $("empty").hidden = true;
  $("empty").replaceChildren();
}

/** Shows that a query found nothing; `clear` removes its filters, if it has some. */
export function showNothingFound(clear) {
  hideEmpty();
  const why = clear
    ? "No moment passes the filters."
    : facts.segments === 0
      ? "The library is empty."
      : "Nothing found. Words in quotes must be said or written exactly like this.";
  const words = [make("h2", { textContent: "No results" }), make("p", { textContent: why })];
  if (clear) words.push(make("button", { type: "button", textContent: "Clear the filters", onclick: clear }));
  show(words);
}

/** Shows what one can do here. */
export async function showStart() {
  hideEmpty();
  const turn = latest;
  const text = facts.has_text
    ? "Describe what is seen or said in a sentence, or drop an image or a video here to find similar ones."
    : "Describe what happens in a sentence, or drop an image or a video here to find similar ones.";
  const words = [make("h2", { textContent: "Find the moment" }), make("p", { textContent: text })];
  if (facts.examples.length) words.push(examplesOf(facts.examples));
  show(words);
  const { films } = await call(`api/films?k=${RECENT_FILMS}`).catch(() => ({ films: [] }));
  if (turn === latest && films.length) $("empty").append(recentOf(films));
}

function show(words) {
  $("empty").replaceChildren(make("div", { className: "hint" }, ...words));
  $("empty").hidden = false;
}

function examplesOf(sentences) {
  const link = (sentence) => {
    const href = `#${new URLSearchParams({ q: sentence })}`;
    return make("li", {}, make("a", { className: "chip", href, dir: "auto", textContent: sentence }));
  };
  const list = make("ul", { ariaLabel: "Examples" }, ...sentences.map(link));
  return make("div", { className: "examples" }, make("span", { textContent: "Try" }), list);
}

function recentOf(films) {
  const section = make("section", { className: "recent" });
  const title = make("h2", { id: "recent-title", textContent: "Recent films" });
  section.setAttribute("aria-labelledby", title.id);
  section.append(title, make("ul", {}, ...films.map(filmOf)));
  return section;
}

function filmOf(film) {
  const image = make("img", { src: `thumbnail/${film.id}`, alt: "", loading: "lazy" });
  const time = make("span", { className: "time", textContent: clock(film.duration) });
  const name = make("span", { className: "name", dir: "auto", textContent: film.name });
  const picture = make("span", { className: "picture" }, image, time);
  const href = `#${new URLSearchParams({ open: film.id, at: "0" })}`;
  return make("li", {}, make("a", { href, title: film.path }, picture, name));
}
