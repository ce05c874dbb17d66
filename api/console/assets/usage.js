// What the tenant used in the last hours, as the API counts it by hour and model.

import { get } from "./api.js";
import { stackedBars } from "./chart.js";
import { action, h, say, showProblem } from "./dom.js";
import { duration, moment, number, quantile } from "./format.js";

/** Hours shown, hours of one bar. */
const SPANS = { 6: 1, 24: 1, 72: 3, 168: 12 };
/** Newest jobs whose waits are told. */
const WAITED = 100;
const ALL = "";

export function usageView() {
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const note = h("p", { class: "dim", role: "status" });
  const figures = h("dl", { class: "figures wide" });
  const charts = h("div", { class: "charts" });
  const hours = h("select", { id: "hours", onchange: () => load() },
    ...Object.keys(SPANS).map((value) => h("option", { value, selected: value === "24" }, value > 48 ? `${value / 24} days` : `${value} hours`)));
  const model = h("select", { id: "usage-model", onchange: () => show() }, h("option", { value: ALL }, "all models"));
  let stopping = new AbortController();
  let known = null;

  async function load() {
    stopping.abort();
    stopping = new AbortController();
    const { signal } = stopping;
    showProblem(problem, null);
    say(note, "Counting …");
    const span = Number(hours.value);
    try {
      const [usage, newest] = await Promise.all([
        get("usage", { hours: span }, { signal }), get("jobs", { limit: WAITED }, { signal })]);
      known = { usage, span, jobs: newest.data };
      offer([...new Set(usage.data.map((each) => each.model))].sort());
      show();
    } catch (error) {
      if (error.name === "AbortError") return;
      say(note, "");
      showProblem(problem, error);
    }
  }

  function offer(models) {
    const chosen = models.includes(model.value) ? model.value : ALL;
    model.replaceChildren(h("option", { value: ALL }, "all models"),
      ...models.map((value) => h("option", { value, selected: value === chosen }, value)));
  }

  function show() {
    if (!known) return;
    const { usage, span } = known;
    const wanted = (each) => model.value === ALL || each.model === model.value;
    const rows = usage.data.filter(wanted);
    const waits = known.jobs.filter(wanted).map((job) => job.usage?.queue_ms).filter((ms) => typeof ms === "number").sort((a, b) => a - b);
    const sum = (...fields) => rows.reduce((total, each) => total + fields.reduce((part, field) => part + each[field], 0), 0);
    const ended = sum("completed", "failed", "cancelled", "expired");
    const fact = (name, value) => h("div", { class: "card" }, h("dt", {}, name), h("dd", {}, value));
    figures.replaceChildren(
      fact("Jobs ended", number(ended)),
      fact("Completed", ended ? `${((100 * sum("completed")) / ended).toFixed(1)} %` : "–"),
      fact("Tokens in", number(sum("input_tokens"))),
      fact("Tokens out", number(sum("output_tokens"))),
      fact("Wait, median", duration(quantile(waits, 0.5))),
      fact("Wait, p95", duration(quantile(waits, 0.95))));
    const { labels, fill } = barsOf(usage.since, span);
    const bars = (value) => fill(rows, value);
    charts.replaceChildren(
      stackedBars({ title: "Jobs", unit: "jobs", labels, series: [
        { name: "completed", kind: "good", values: bars((each) => each.completed) },
        { name: "failed", kind: "bad", values: bars((each) => each.failed) },
        { name: "cancelled, expired", kind: "odd", values: bars((each) => each.cancelled + each.expired) },
      ] }),
      stackedBars({ title: "Tokens", unit: "tokens", labels, series: [
        { name: "in", kind: "one", values: bars((each) => each.input_tokens - each.cached_tokens) },
        { name: "in, cached", kind: "open", values: bars((each) => each.cached_tokens) },
        { name: "out", kind: "two", values: bars((each) => each.output_tokens) },
      ] }));
    const waited = waits.length ? `; waits are those of the newest ${waits.length === 1 ? "job" : `${number(waits.length)} jobs`}` : "";
    say(note, `Jobs that ended in the ${number(span)} hours until ${moment(usage.until)}${waited}.`);
  }

  const root = h("div", { class: "stack" },
    h("div", { class: "head" }, h("h1", { tabindex: "-1" }, "Usage"),
      h("div", { class: "actions" }, h("label", { for: "usage-model" }, "Model"), model,
        h("label", { for: "hours" }, "Last"), hours, action("Refresh", {}, load))),
    problem, figures, charts, note);
  return { root, show: load, hide: () => stopping.abort() };
}

/** Equal parts of the hours from `since` on; the last one ends with the running hour. */
function barsOf(since, span) {
  const width = SPANS[span];
  const labels = [];
  for (let hour = 0; hour < span; hour += width) {
    const date = new Date((since + hour * 3600) * 1000);
    const clock = `${String(date.getHours()).padStart(2, "0")}:${String(date.getMinutes()).padStart(2, "0")}`;
    labels.push(span > 24 ? `${date.toLocaleDateString("en", { weekday: "short" })} ${clock}` : clock);
  }
  return {
    labels,
    fill(rows, value) {
      const values = labels.map(() => 0);
      for (const each of rows) values[Math.floor((each.hour - since) / 3600 / width)] += value(each);
      return values;
    },
  };
}
