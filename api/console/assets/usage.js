// What the tenant used in the last hours, counted from its listed jobs.

import { get } from "./api.js";
import { stackedBars } from "./chart.js";
import { action, h, say, showProblem } from "./dom.js";
import { duration, hasEnded, moment, number, quantile } from "./format.js";

const SPANS = { 1: 5, 6: 30, 24: 60 };
const PAGE = 100;
/** Beyond these the charts say that they don't show all. */
const MOST = 2000;

export function usageView() {
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const note = h("p", { class: "dim", role: "status" });
  const figures = h("dl", { class: "figures wide" });
  const charts = h("div", { class: "charts" });
  const hours = h("select", { id: "hours", onchange: () => load() },
    ...Object.keys(SPANS).map((value) => h("option", { value, selected: value === "6" }, value === "1" ? "1 hour" : `${value} hours`)));
  let stopping = new AbortController();

  async function load() {
    stopping.abort();
    stopping = new AbortController();
    const { signal } = stopping;
    showProblem(problem, null);
    say(note, "Counting …");
    const span = Number(hours.value);
    try {
      const { jobs, all } = await jobsOf(span, signal);
      show(jobs, span);
      const counted = `${number(jobs.length)} ${jobs.length === 1 ? "job" : "jobs"} at ${moment(Date.now() / 1000)}`;
      say(note, all ? counted : `Only the newest ${counted}`);
    } catch (error) {
      if (error.name === "AbortError") return;
      say(note, "");
      showProblem(problem, error);
    }
  }

  function show(jobs, span) {
    const waits = jobs.map((job) => job.usage?.queue_ms).filter((ms) => typeof ms === "number").sort((a, b) => a - b);
    const sum = (field) => jobs.reduce((total, job) => total + (job.usage?.[field] ?? 0), 0);
    const ended = jobs.filter(hasEnded);
    const well = ended.filter((job) => job.status === "completed");
    const fact = (name, value) => h("div", { class: "card" }, h("dt", {}, name), h("dd", {}, value));
    figures.replaceChildren(
      fact("Jobs", number(jobs.length)),
      fact("Completed", ended.length ? `${((100 * well.length) / ended.length).toFixed(1)} %` : "–"),
      fact("Tokens in", number(sum("input_tokens"))),
      fact("Tokens out", number(sum("output_tokens"))),
      fact("Wait, median", duration(quantile(waits, 0.5))),
      fact("Wait, p95", duration(quantile(waits, 0.95))));
    const slots = slotsOf(span, SPANS[span] * 60);
    const count = (test, of = () => 1) => slots.fill(jobs, (job) => (test(job) ? of(job) : 0));
    charts.replaceChildren(
      stackedBars({ title: "Jobs", unit: "jobs", labels: slots.labels, series: [
        { name: "completed", kind: "good", values: count((job) => job.status === "completed") },
        { name: "failed", kind: "bad", values: count((job) => job.status === "failed") },
        { name: "cancelled, expired", kind: "odd", values: count((job) => ["cancelled", "expired"].includes(job.status)) },
        { name: "not ended", kind: "open", values: count((job) => !hasEnded(job)) },
      ] }),
      stackedBars({ title: "Tokens", unit: "tokens", labels: slots.labels, series: [
        { name: "in", kind: "one", values: count((job) => job.usage, (job) => job.usage.input_tokens) },
        { name: "out", kind: "two", values: count((job) => job.usage, (job) => job.usage.output_tokens) },
      ] }));
  }

  const root = h("div", { class: "stack" },
    h("div", { class: "head" }, h("h1", { tabindex: "-1" }, "Usage"),
      h("div", { class: "actions" }, h("label", { for: "hours" }, "Last"), hours, action("Refresh", {}, load))),
    problem, figures, charts, note);
  return { root, show: load, hide: () => stopping.abort() };
}

async function jobsOf(span, signal) {
  const jobs = [];
  let after = null;
  for (;;) {
    const query = { limit: PAGE, after, created_after: Math.floor(Date.now() / 1000) - span * 3600 };
    const page = await get("jobs", query, { signal });
    jobs.push(...page.data);
    if (!page.has_more || jobs.length >= MOST) return { jobs, all: !page.has_more };
    after = page.last_id;
  }
}

/** Equal parts by the clock; the last one holds this moment, the first one is not all of the span. */
function slotsOf(span, widthS) {
  const last = Math.floor(Date.now() / 1000 / widthS);
  const first = last - (span * 3600) / widthS;
  const labels = [];
  for (let slot = first; slot <= last; slot++) {
    const date = new Date(slot * widthS * 1000);
    labels.push(`${String(date.getHours()).padStart(2, "0")}:${String(date.getMinutes()).padStart(2, "0")}`);
  }
  return {
    labels,
    fill(jobs, value) {
      const values = labels.map(() => 0);
      for (const job of jobs) {
        const index = Math.floor(job.created_at / widthS) - first;
        // The server's clock may be ahead.
        values[Math.max(0, Math.min(index, values.length - 1))] += value(job);
      }
      return values;
    },
  };
}
