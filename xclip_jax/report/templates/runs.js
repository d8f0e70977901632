// Sorts the table of runs and draws the curves of those whose boxes are checked.
"use strict";
const runs = JSON.parse(document.getElementById("curves").textContent);
const body = document.querySelector("#runs tbody");
const rows = [...body.rows];
const all = document.getElementById("all");
const boxes = rows.map((row) => row.querySelector("input"));
const dashes = ["", "7 3", "2 3", "9 3 2 3"];
const style = (run) =>
  `stroke: hsl(${(run * 137.5) % 360} 65% 50%); stroke-width: 2; ` +
  `stroke-dasharray: ${dashes[Math.floor(run / 8) % dashes.length] || "none"}`;

function sortBy(heading) {
  const column = heading.cellIndex, isText = heading.dataset.kind === "text";
  const wasUp = heading.getAttribute("aria-sort") === "ascending";
  const wasDown = heading.getAttribute("aria-sort") === "descending";
  const isUp = isText ? !wasUp : wasDown; // numbers: the largest first
  const key = (row) => {
    const text = row.cells[column].dataset.key;
    if (isText) return text;
    return text === "" ? NaN : Number(text);
  };
  const isMissing = (value) => value === "" || Number.isNaN(value);
  const compare = (a, b) =>
    isText ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
  rows.sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b); // always last
    return isUp ? compare(a, b) : compare(b, a);
  });
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", isUp ? "ascending" : "descending");
  body.append(...rows);
}

function element(parent, name, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  parent.append(node);
  return node;
}

function ticks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const values = [];
  for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-9); k++)
    values.push(Number((k * step).toPrecision(10)));
  return values;
}

function draw(svg) {
  svg.replaceChildren();
  const lines = rows.map((row) => Number(row.dataset.run))
    .filter((run) => body.querySelector(`[data-run="${run}"] input`).checked)
    .map((run) => [run, runs[run].curves[svg.dataset.title] || []])
    .filter(([, points]) => points.length);
  const points = lines.flatMap(([, points]) => points);
  if (!points.length) return;
  const [right, top] = [0, 1].map((axis) => points.reduce((m, p) => Math.max(m, p[axis]), 0) || 1);
  const low = points.reduce((m, p) => Math.min(m, p[1]), 0);
  const x = (step) => 42 + (500 * step) / right;
  const y = (value) => 268 - (250 * (value - low)) / (top - low || 1);
  for (const value of ticks(low, top)) {
    element(svg, "line", { x1: 42, x2: 542, y1: y(value), y2: y(value) });
    element(svg, "text", { x: 36, y: y(value) + 4, "text-anchor": "end" }, value);
  }
  for (const value of ticks(0, right))
    element(svg, "text", { x: x(value), y: 288, "text-anchor": "middle" }, value);
  for (const [run, points] of lines) {
    const group = element(svg, "g", { "data-run": run });
    const path = points.map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`);
    const d = `M${path.join("L")}` + (points.length === 1 ? "h3" : "");
    element(group, "path", { d, style: style(run) });
    const hit = element(group, "path", { d, class: "hit" });
    element(hit, "title", {}, `${runs[run].name}: ${points.at(-1)[1]} at step ${points.at(-1)[0]}`);
    group.addEventListener("pointerenter", () => light(run));
    group.addEventListener("pointerleave", () => light(null));
  }
}

function light(run) {
  for (const row of rows) row.classList.toggle("lit", row.dataset.run === String(run));
  for (const group of document.querySelectorAll(".charts g"))
    group.classList.toggle("dimmed", run !== null && group.dataset.run !== String(run));
}

function drawAll() {
  document.querySelectorAll(".charts svg").forEach(draw);
  const checked = boxes.filter((box) => box.checked).length;
  all.checked = checked === boxes.length;
  all.indeterminate = checked > 0 && checked < boxes.length;
}

for (const heading of document.querySelectorAll("th[data-kind]"))
  heading.addEventListener("click", (event) => event.target === all || sortBy(heading));
for (const row of rows) {
  const run = Number(row.dataset.run);
  row.querySelector("path").style.cssText = style(run);
  row.addEventListener("pointerenter", () => light(run));
  row.addEventListener("pointerleave", () => light(null));
}
boxes.forEach((box) => box.addEventListener("change", drawAll));
all.addEventListener("change", () => {
  for (const box of boxes) box.checked = all.checked;
  drawAll();
});
drawAll();
