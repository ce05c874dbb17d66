// Stacked bars as inline SVG, with the same figures as a table for who can't see them.

import { h, svg } from "./dom.js";
import { number } from "./format.js";

const WIDTH = 480;
const HEIGHT = 184;
const LEFT = 48;
const RIGHT = 12;
const BOTTOM = 30;
const TOP = 14;

/**
 * `series`: `{name, kind, values}` with a value per label; `kind` is the class that colours it.
 */
export function stackedBars({ title, labels, series, unit }) {
  const totals = labels.map((_, index) => series.reduce((sum, each) => sum + each.values[index], 0));
  const top = ceiling(Math.max(1, ...totals));
  const inner = { width: WIDTH - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM };
  const y = (value) => TOP + inner.height * (1 - value / top);
  const step = inner.width / labels.length;
  const every = Math.ceil(labels.length / 8);
  const picture = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", class: "chart",
    "aria-label": `${title}: ${number(totals.reduce((sum, each) => sum + each, 0))} ${unit} in all`,
  });
  for (const share of [0, 0.5, 1]) {
    const value = top * share;
    picture.append(
      svg("line", { class: "rule", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { class: "mark", x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  labels.forEach((label, index) => {
    let below = 0;
    const x = LEFT + index * step + step * 0.12;
    for (const { name, kind, values } of series) {
      if (!values[index]) continue;
      const height = Math.max(1, y(below) - y(below + values[index]));
      picture.append(svg("rect", { class: kind, x, width: step * 0.76, y: y(below) - height, height, rx: 1.5 },
        svg("title", {}, `${label} · ${name}: ${number(values[index])}`)));
      below += values[index];
    }
    if (index % every === 0) {
      picture.append(svg("text", { class: "mark", x: LEFT + (index + 0.5) * step, y: HEIGHT - 8, "text-anchor": "middle" }, label));
    }
  });
  const legend = h("ul", { class: "legend" },
    ...series.map(({ name, kind }) => h("li", {}, h("span", { class: `key ${kind}`, "aria-hidden": "true" }), name)));
  const table = h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "From"), ...series.map(({ name }) => h("th", { scope: "col", class: "figure" }, name)))),
    h("tbody", {}, ...labels.map((label, index) => h("tr", {}, h("th", { scope: "row" }, label),
      ...series.map(({ values }) => h("td", { class: "figure" }, number(values[index])))))));
  return h("figure", { class: "card" }, h("figcaption", {}, h("h2", {}, title), legend), picture,
    h("details", {}, h("summary", {}, "As a table"), table));
}

/** The next of 1, 2, 4, 5, 10, 20, … so that half of it reads well too. */
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 10].map((each) => each * power).find((each) => each >= value);
}

function short(value) {
  if (value >= 1_000_000) return `${+(value / 1_000_000).toFixed(1)}M`;
  if (value >= 1000) return `${+(value / 1000).toFixed(1)}k`;
  return String(+value.toFixed(1));
}
