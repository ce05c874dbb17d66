// A prompt as a background job, its text as it comes, and the way to stop it.

import { get, post } from "./api.js";
import { action, h, notify, say, showProblem } from "./dom.js";
import { duration, number, outputText } from "./format.js";
import { cancel, openJob, place, setBadge } from "./job.js";
import { Poller } from "./poller.js";
import { follow } from "./stream.js";

const PLACE_MS = 1500;

export function promptView() {
  const problem = h("p", { class: "problem", role: "alert", hidden: true, id: "prompt-problem" });
  const model = h("select", { id: "model", required: true });
  const priority = h("select", { id: "priority" },
    h("option", { value: "" }, "Default"),
    ...["interactive", "standard", "batch"].map((value) => h("option", { value }, value)));
  const tokens = h("input", { id: "tokens", type: "number", min: "1", value: "128", inputmode: "numeric" });
  const text = h("textarea", { id: "text", rows: "5", required: true, "aria-describedby": "keys",
    placeholder: "Name three rivers.",
    onkeydown: (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    } });
  const send = h("button", { type: "submit", class: "primary" }, "Send");
  const run = new Run(problem);
  const field = (label, control) => h("div", { class: "field" }, h("label", { for: control.id }, label), control);
  const form = h("form", { class: "card", onsubmit: submit },
    field("Prompt", text),
    h("div", { class: "fields" }, field("Model", model), field("Priority", priority), field("Most tokens", tokens)),
    problem,
    h("div", { class: "actions" }, send, h("span", { class: "dim", id: "keys" }, "or Ctrl + Enter")));

  async function submit(event) {
    event.preventDefault();
    showProblem(problem, null);
    send.disabled = true;
    try {
      const job = await post("jobs", {
        endpoint: "/v1/chat/completions",
        body: { model: model.value, stream: true, max_tokens: tokens.valueAsNumber, messages: [{ role: "user", content: text.value }] },
        ...(priority.value ? { priority: priority.value } : {}),
      });
      run.start(job);
    } catch (error) {
      showProblem(problem, error);
    } finally {
      send.disabled = false;
    }
  }

  async function loadModels() {
    const found = (await get("models")).data.filter((each) => each.kind === "chat");
    const chosen = model.value;
    model.replaceChildren(...found.map((each) => h("option", { value: each.id, title: each.description }, each.id)));
    if (chosen) model.value = chosen;
    if (!found.length) throw new Error("There is no model for chats.");
  }

  const root = h("div", {}, h("h1", { tabindex: "-1" }, "Prompt"), form, run.root);
  return {
    root,
    show: () => loadModels().catch((error) => showProblem(problem, error)),
    end: () => run.end(),
  };
}

/** The job that was sent last. */
class Run {
  #problem; #job = null; #stopping = null; #frame = 0; #text = ""; #poller = null;
  #badge = h("span", {});
  #state = h("span", { role: "status", "aria-live": "polite" });
  // One announcement at the end instead of one per token: it is busy until then.
  #output = h("div", { class: "output stream", role: "log", "aria-live": "polite", "aria-label": "Answer", "aria-busy": "false", tabindex: "0" });
  #cancel; #details;

  constructor(problem) {
    this.#problem = problem;
    this.#cancel = action("Cancel", { kind: "danger", place: problem }, async () => {
      await cancel(this.#job);
      say(this.#state, "Cancelling");
    });
    this.#details = action("Details", {}, () => openJob(this.#job.id));
    this.root = h("section", { class: "card", "aria-labelledby": "answer-title", hidden: true },
      h("div", { class: "head" },
        h("h2", { id: "answer-title" }, "Answer"),
        h("div", { class: "actions" }, this.#cancel, this.#details)),
      h("p", { class: "state" }, this.#badge, this.#state),
      this.#output);
  }

  start(job) {
    this.end();
    this.#job = job;
    this.#stopping = new AbortController();
    this.root.hidden = this.#cancel.hidden = false;
    this.#write("");
    this.#output.replaceChildren();
    this.#output.setAttribute("aria-busy", "true");
    this.#show("queued", "Waiting");
    this.#watchPlace();
    this.#follow(job, this.#stopping.signal);
  }

  end() {
    this.#stopping?.abort();
    this.#poller?.stop();
  }

  /** While it waits: where it stands, and when it may start. */
  #watchPlace() {
    this.#poller = new Poller(async () => {
      const job = await get(["jobs", this.#job.id], {}, { signal: this.#stopping.signal });
      if (job.id === this.#job.id && job.status === "queued" && job.queue) {
        const startMs = (job.queue.estimated_start_ms ?? 0) - Date.now();
        this.#show("queued", place(job.queue) + (startMs > 0 ? `, starts in about ${duration(startMs)}` : ""));
      } else {
        this.#poller.stop();
      }
      return PLACE_MS;
    }, () => {});
    this.#poller.start();
  }

  async #follow(job, signal) {
    try {
      const state = await follow(job.id, {
        signal,
        take: (now) => {
          if (now.status !== "queued") this.#poller.stop();
          if (now.status === "in_progress") this.#show("in_progress", now.attempt > 1 ? `Attempt ${now.attempt}` : "Writing");
          else if (!now.job) this.#show(now.status, now.status === "queued" ? "Waiting" : "");
          this.#write(now.text);
        },
        lost: (is) => is && say(this.#state, "Connection lost; going on from where it was"),
      });
      this.#finish(state);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.#poller.stop();
      this.#output.setAttribute("aria-busy", "false");
      showProblem(this.#problem, error);
    }
  }

  #finish({ job, text }) {
    this.#poller.stop();
    this.#cancel.hidden = true;
    if (job) {
      this.#write(outputText(job.output) || text);
      const usage = job.usage;
      const cost = usage ? `${number(usage.input_tokens)} + ${number(usage.output_tokens)} tokens` : "";
      const times = usage?.run_ms !== null && usage?.run_ms !== undefined
        ? `waited ${duration(usage.queue_ms)}, ran ${duration(usage.run_ms)}` : "not started";
      this.#show(job.status, [cost, times].filter(Boolean).join(" · "));
      if (job.error) showProblem(this.#problem, new Error(`${job.error.message} · ${job.error.code}`));
      notify(`The job is ${job.status}.`);
    }
    this.#output.setAttribute("aria-busy", "false");
  }

  #show(status, text) {
    setBadge(this.#badge, status);
    say(this.#state, text);
  }

  /** At most once per frame, and only what is new: selections stay, long answers stay cheap. */
  #write(text) {
    this.#text = text;
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      const shown = this.#output.textContent;
      if (this.#text === shown) return;
      const atEnd = this.#output.scrollHeight - this.#output.scrollTop - this.#output.clientHeight < 40;
      if (shown && this.#text.startsWith(shown)) this.#output.append(this.#text.slice(shown.length));
      else this.#output.textContent = this.#text;
      if (atEnd) this.#output.scrollTop = this.#output.scrollHeight;
    });
  }
}
