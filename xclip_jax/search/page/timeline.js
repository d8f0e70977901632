// A film's timeline, with a mark for each matching moment. Tab goes to it, arrow keys from mark to mark.

import { make, range } from "./dom.js";

/** Strong marks are higher, so that they differ by more than colour. */
const strengthOf = ({ rank, weak }) => (weak ? "weak" : rank <= 3 ? "best" : rank <= 12 ? "good" : "fair");

/** Returns the name of a moment for screen readers. */
export function labelOf(hit) {
  const rank = hit.rank ? `, result ${hit.rank}` : "";
  return `${range(hit)}${rank}${hit.weak ? ", weak match" : ""}`;
}

/** Shows the moments on a timeline; `addressOf` returns the address that opens one. */
export function showMarks(timeline, hits, duration, addressOf, current = null) {
  const inOrder = [...hits].sort((a, b) => a.start - b.start || a.rank - b.rank);
  const focused = timeline.contains(document.activeElement) ? document.activeElement.href : null;
  const marks = inOrder.map((hit) => markOf(hit, duration, addressOf(hit), hit === current));
  const first = marks.find((mark) => mark.ariaCurrent === "true") ?? marks[0];
  for (const mark of marks) mark.tabIndex = mark === first ? 0 : -1;
  timeline.querySelectorAll(".mark").forEach((mark) => mark.remove());
  timeline.append(...marks);
  if (focused) marks.find((mark) => mark.href === focused)?.focus();
}

function markOf(hit, duration, href, isCurrent) {
  const mark = make("a", { className: `mark ${strengthOf(hit)}`, href, title: labelOf(hit) });
  mark.ariaLabel = labelOf(hit);
  mark.dataset.second = hit.second;
  if (isCurrent) mark.ariaCurrent = "true";
  const share = (second) => Math.min(1, Math.max(0, second / duration));
  mark.style.left = `${100 * share(hit.start)}%`;
  mark.style.width = `${100 * (share(hit.end) - share(hit.start))}%`;
  mark.style.zIndex = String(Math.max(1, 1000 - (hit.rank || 1000)));
  return mark;
}

/** Returns an empty timeline. */
export function makeTimeline(label) {
  const timeline = make("div", { className: "timeline", role: "toolbar", ariaLabel: label });
  timeline.append(make("i", { className: "head" }));
  enableArrows(timeline);
  return timeline;
}

function enableArrows(timeline) {
  timeline.addEventListener("keydown", (event) => {
    const marks = [...timeline.querySelectorAll(".mark")];
    const from = marks.indexOf(event.target);
    const last = marks.length - 1;
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: last }[event.key];
    if (from < 0 || to === undefined) return;
    event.preventDefault();
    const mark = marks[Math.min(last, Math.max(0, to))];
    for (const one of marks) one.tabIndex = one === mark ? 0 : -1;
    mark.focus();
  });
}

/** Shows a line at a share of the film, none for null. */
export function showHead(timeline, share) {
  timeline.classList.toggle("headed", share !== null);
  if (share !== null) timeline.style.setProperty("--head", `${100 * Math.min(1, Math.max(0, share))}%`);
}
