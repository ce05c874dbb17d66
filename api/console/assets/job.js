// One job: its cells in the list, and a dialog with all there is to it.

import { get, post, remove } from "./api.js";
import { action, confirmed, h, notify, say, showProblem } from "./dom.js";
import { duration, hasEnded, moment, number, outputText, status } from "./format.js";
import { follow } from "./stream.js";

export function badge(value) {
  return setBadge(h("span", {}), value);
}

export function setBadge(element, value) {
  element.className = `badge ${value}`;
  say(element, status(value));
  return element;
}

/** How long it waited; of a waiting one how long it has, and its place where that is known. */
export function waited(job, nowS = Date.now() / 1000) {
  if (job.usage?.queue_ms !== null && job.usage?.queue_ms !== undefined) return duration(job.usage.queue_ms);
  if (job.started_at) return duration(Math.max(0, job.started_at - job.created_at) * 1000);
  if (hasEnded(job)) return duration((job.completed_at - job.created_at) * 1000);
  const soFar = duration(Math.max(0, nowS - job.created_at) * 1000);
  return job.queue ? `${soFar} · ${place(job.queue)}` : soFar;
}

/** Where it stands among the tenant's own jobs. */
export function place({ position }) {
  return position ? `${number(position)} before it` : "next";
}

export function ran(job, nowS = Date.now() / 1000) {
  if (job.usage) return duration(job.usage.run_ms);
  return job.started_at ? duration(Math.max(0, nowS - job.started_at) * 1000) : "–";
}

export const cancel = (job) => post(["jobs", job.id, "cancel"]);

/** Opens the dialog; `changed()` is called when the job was cancelled, retried or deleted in it. */
export function openJob(id, changed) {
  const stopping = new AbortController();
  const facts = h("dl", { class: "facts" });
  const output = h("pre", { class: "output", tabindex: "0", role: "region", "aria-label": "Output" });
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const failure = h("p", { class: "problem", hidden: true });
  const buttons = h("div", { class: "actions" });
  const dialog = h("dialog", { class: "card job", "aria-labelledby": "job-title" },
    h("div", { class: "head" },
      h("h2", { id: "job-title" }, "Job ", h("code", {}, id)),
      h("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Close")),
    failure, facts, h("h3", {}, "Output"), output, problem, buttons);
  dialog.addEventListener("close", () => {
    stopping.abort();
    dialog.remove();
  });

  function show(job, text) {
    const rows = [
      ["Status", badge(job.status)],
      ["Model", job.model],
      ["Endpoint", job.endpoint],
      ["Priority", job.priority],
      ["Created", moment(job.created_at)],
      ["Waited", waited(job)],
      ["Ran", ran(job)],
      ["Attempt", `${job.attempt} of ${job.max_attempts}`],
      job.deadline_at && ["Start by", moment(job.deadline_at)],
      job.completed_at && ["Ended", moment(job.completed_at)],
      job.expires_at && ["Kept until", moment(job.expires_at)],
      job.usage && ["Tokens in", number(job.usage.input_tokens)],
      job.usage && ["Tokens out", number(job.usage.output_tokens)],
      ...Object.entries(job.metadata ?? {}).map(([name, value]) => [name, value]),
    ].filter(Boolean);
    facts.replaceChildren(...rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    showProblem(failure, job.error ? new Error(`${job.error.message} · ${job.error.code}`) : null);
    say(output, text || (job.erased_at ? "Erased." : hasEnded(job) ? "None." : "None yet."));
    const wanted = hasEnded(job)
      ? ["failed", "expired"].includes(job.status) ? ["retry", "delete"] : ["delete"]
      : job.status === "cancelling" ? [] : ["cancel"];
    if (buttons.dataset.for !== wanted.join()) {
      buttons.dataset.for = wanted.join();
      buttons.replaceChildren(...wanted.map((name) => ACTIONS[name]()));
    }
  }

  const after = async () => {
    changed?.();
    await look();
  };
  const ACTIONS = {
    cancel: () => action("Cancel job", { kind: "danger", place: problem }, async () => {
      await cancel({ id });
      changed?.();
    }),
    retry: () => action("Run again", { kind: "primary", place: problem }, async () => {
      await post(["jobs", id, "retry"]);
      await after();
    }),
    delete: () => action("Delete", { kind: "danger", place: problem }, async () => {
      if (!await confirmed("Erase the prompt and the output of this job? This can't be undone.", "Erase")) return;
      await remove(["jobs", id]);
      notify("The job's content was erased.");
      changed?.();
      dialog.close();
    }),
  };

  async function look() {
    let job = await get(["jobs", id], {}, { signal: stopping.signal });
    show(job, outputText(job.output));
    if (hasEnded(job)) return;
    await follow(id, {
      signal: stopping.signal,
      take(state) {
        job = state.job ?? { ...job, status: state.status, attempt: state.attempt };
        if (!state.job && state.status === "in_progress") job.started_at ??= Math.floor(Date.now() / 1000);
        show(job, state.job ? outputText(state.job.output) || state.text : state.text);
      },
    });
    changed?.();
  }

  document.body.append(dialog);
  dialog.showModal();
  look().catch((error) => {
    if (error.name !== "AbortError") showProblem(problem, error);
  });
}
