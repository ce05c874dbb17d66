// The tenant's part of the queues, and its jobs, newest first; both kept up to date.

import { get } from "./api.js";
import { action, h, notify, say, showProblem, describe } from "./dom.js";
import { duration, hasEnded, moment, number } from "./format.js";
import { badge, cancel, openJob, ran, setBadge, waited } from "./job.js";
import { Poller } from "./poller.js";

const PAGE = 25;
/** Waiting jobs whose place is asked for: a call each. */
const PLACES = 8;
const BUSY_MS = 2000;
const IDLE_MS = 5000;
const COLUMNS = ["Status", "Job", "Model", "Priority", "Created", "Waited", "Ran", "Tokens", ""];

export function jobsView() {
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const queues = h("div", { class: "tiles" });
  const rows = new Rows((job) => openJob(job.id, () => poller.now()), () => poller.now());
  const choose = (label, name, options) => {
    const select = h("select", { id: `by-${name}`, onchange: () => again() },
      ...options.map(([value, shown]) => h("option", { value }, shown)));
    return [select, h("div", { class: "field" }, h("label", { for: `by-${name}` }, label), select)];
  };
  const [byStatus, statusField] = choose("Status", "status", [["", "All"], ["queued", "Queued"],
    ["in_progress", "Running"], ["completed", "Completed"], ["failed", "Failed"],
    ["cancelled", "Cancelled"], ["expired", "Expired"]]);
  const [byPriority, priorityField] = choose("Priority", "priority", [["", "All"],
    ["interactive", "Interactive"], ["standard", "Standard"], ["batch", "Batch"]]);
  const [byModel, modelField] = choose("Model", "model", [["", "All"]]);
  const empty = h("p", { class: "empty", hidden: true }, "No jobs here yet. ", h("a", { href: "#prompt" }, "Send a prompt"), " to make one.");
  const updated = h("p", { class: "dim" }, "Loading …");
  /** Ids after which older pages begin; the newest page begins after nothing. */
  let pages = [null];
  const page = () => pages[pages.length - 1];
  const newer = action("Newer", {}, () => turn(() => pages.pop()));
  const older = action("Older", {}, () => turn(() => pages.push(rows.lastId)));

  function turn(change) {
    change();
    return poller.now();
  }

  function again() {
    pages = [null];
    poller.now();
  }

  async function refresh() {
    const query = { limit: PAGE, after: page(), status: byStatus.value, priority: byPriority.value, model: byModel.value };
    const [parts, jobs] = await Promise.all([get("queues"), get("jobs", query)]);
    await addPlaces(jobs.data);
    showProblem(problem, null);
    showQueues(queues, parts.data);
    for (const { model } of parts.data) {
      if (![...byModel.options].some((option) => option.value === model)) byModel.append(h("option", { value: model }, model));
    }
    rows.show(jobs.data);
    empty.hidden = jobs.data.length > 0;
    newer.hidden = pages.length === 1;
    older.hidden = !jobs.has_more;
    say(updated, `Updated ${moment(Date.now() / 1000)}`);
    const busy = jobs.data.some((job) => !hasEnded(job)) || parts.data.some((part) => part.running || waiting(part));
    return busy ? BUSY_MS : IDLE_MS;
  }

  const poller = new Poller(refresh, (error) => showProblem(problem, error));
  const root = h("div", {},
    h("div", { class: "head" }, h("h1", { tabindex: "-1" }, "Jobs"), updated),
    problem,
    h("section", { "aria-label": "Your part of the queues" }, queues),
    h("section", { class: "card", "aria-label": "Jobs" },
      h("div", { class: "fields filters" }, statusField, modelField, priorityField),
      rows.table, empty,
      h("div", { class: "actions end" }, newer, older)));
  return { root, show: () => poller.start(), hide: () => poller.stop() };
}

/** A listing has no places; they are asked for those that wait longest. */
async function addPlaces(jobs) {
  const first = jobs.filter((job) => job.status === "queued").slice(-PLACES);
  const found = await Promise.allSettled(first.map((job) => get(["jobs", job.id])));
  found.forEach((each, index) => {
    if (each.status === "fulfilled") Object.assign(first[index], each.value);
  });
}

const waiting = (part) => Object.values(part.priorities).reduce((sum, band) => sum + band.waiting, 0);

function showQueues(place, parts) {
  place.replaceChildren(...parts.map((part) => {
    const oldest = Math.max(0, ...Object.values(part.priorities).map((band) => band.oldest_ms));
    const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
    return h("article", { class: "card tile", "data-model": part.model },
      h("h2", {}, `${part.model} `, part.mode === "running" ? null : h("span", { class: "badge expired" }, part.mode)),
      h("dl", { class: "figures" },
        fact("Waiting", number(waiting(part))), fact("Running", number(part.running)),
        fact("Oldest waits", oldest ? duration(oldest) : "–"), fact("Tokens/s", part.tokens_per_s.toFixed(1))),
      h("p", { class: "dim" }, Object.entries(part.priorities).map(([name, band]) => `${name} ${number(band.waiting)}`).join(" · "),
        part.delayed ? ` · delayed ${number(part.delayed)}` : ""));
  }));
}

/** The table, changed in place: a row that is looked at or has the focus stays what it is. */
class Rows {
  #byId = new Map();
  #body = h("tbody", { role: "rowgroup" });
  #open; #changed;
  lastId = null;

  constructor(open, changed) {
    this.#open = open;
    this.#changed = changed;
    // The roles stay when a narrow screen shows rows as cards.
    this.table = h("table", { role: "table", "aria-label": "Jobs, newest first" },
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" },
        ...COLUMNS.map((name) => h("th", { scope: "col", role: "columnheader", class: ["Waited", "Ran", "Tokens"].includes(name) ? "figure" : null },
          name || h("span", { class: "unseen" }, "Actions"))))),
      this.#body);
  }

  show(jobs) {
    this.lastId = jobs.at(-1)?.id ?? null;
    this.table.hidden = jobs.length === 0;
    const now = new Set(jobs.map((job) => job.id));
    for (const [id, row] of this.#byId) {
      if (!now.has(id)) {
        row.element.remove();
        this.#byId.delete(id);
      }
    }
    jobs.forEach((job, index) => {
      let row = this.#byId.get(job.id);
      if (!row) this.#byId.set(job.id, row = this.#make(job));
      this.#update(row, job);
      if (this.#body.children[index] !== row.element) this.#body.insertBefore(row.element, this.#body.children[index] ?? null);
    });
  }

  #make(job) {
    const cells = Object.fromEntries(COLUMNS.map((name) => [name, h("td", { role: "cell", "data-label": name })]));
    for (const name of ["Waited", "Ran", "Tokens"]) cells[name].className = "figure";
    const mark = badge(job.status);
    cells.Status.append(mark);
    cells.Job.append(h("button", { type: "button", class: "link", title: job.id, "aria-label": `Open ${job.id}`, onclick: () => this.#open(job) },
      h("code", {}, `…${job.id.slice(-8)}`)));
    const stop = action("Cancel", { name: `Cancel ${job.id}` }, async () => {
      try {
        await cancel(job);
      } catch (error) {
        notify(describe(error));
      }
      this.#changed();
    });
    cells[""].append(stop);
    return { element: h("tr", { role: "row", "data-job": job.id }, ...Object.values(cells)), cells, mark, stop };
  }

  #update({ cells, mark, stop }, job) {
    setBadge(mark, job.status);
    say(cells.Model, job.model);
    say(cells.Priority, job.priority);
    say(cells.Created, moment(job.created_at));
    say(cells.Waited, waited(job));
    say(cells.Ran, ran(job));
    say(cells.Tokens, job.usage ? number(job.usage.total_tokens) : "–");
    stop.hidden = hasEnded(job) || job.status === "cancelling";
  }
}
