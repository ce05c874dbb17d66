// Server-sent events by fetch: an EventSource can't send the key in a header.

import { ApiError, Unreachable, open } from "./api.js";

const SLOWEST_MS = 8000;

/** The events of a body: `{id, event, data}`; comments are left out. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { id: null, event: "message", data: [] };
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      // A carriage return at the very end may be half of a line's end.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (event.data.length) yield { ...event, data: event.data.join("\n") };
          event = { id: null, event: "message", data: [] };
          continue;
        }
        const [, field, text] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
        if (field === "data") event.data.push(text ?? "");
        else if (field === "id") event.id = text ?? "";
        else if (field === "event") event.event = text ?? "";
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/**
 * Follows a job to its end over any break of the connection: `take(state)` gets `{status, text,
 * attempt, job}` after each event, `job` being the whole job once it has ended. `lost(true)` tells of
 * a break, `lost(false)` of its end. Throws what no repetition mends.
 */
export async function follow(jobId, { signal, take, lost = () => {} }) {
  const state = { status: "queued", text: "", attempt: 0, job: null };
  let cursor = 0;
  let waitMs = 0;
  for (;;) {
    try {
      const headers = cursor ? { "Last-Event-ID": String(cursor) } : {};
      const response = await open("GET", ["jobs", jobId, "events"], { headers, signal });
      if (response.status === 204) return state;
      lost(false);
      for await (const { id, data } of events(response.body)) {
        waitMs = 0;
        cursor = Number(id);
        apply(state, JSON.parse(data));
        take(state);
        if (state.job) return state;
      }
    } catch (error) {
      const passing = error instanceof Unreachable || error instanceof TypeError
        || (error instanceof ApiError && (error.status === 429 || error.status >= 500));
      if (!passing || signal?.aborted) throw error;
      waitMs = Math.max(waitMs, error.retryAfterMs ?? 0);
    }
    lost(true);
    waitMs = Math.min(SLOWEST_MS, waitMs * 2 || 250);
    await pause(waitMs * (0.75 + Math.random() / 2), signal);
  }
}

function apply(state, event) {
  // Text of an attempt that was given up counts no more.
  if (event.attempt !== state.attempt || event.type === "job.requeued") state.text = "";
  state.attempt = event.attempt;
  if (event.type === "job.snapshot") {
    state.status = event.status;
    state.text = event.text;
  } else if (event.type === "job.delta") {
    state.status = "in_progress";
    state.text += event.text;
  } else if (event.type === "job.requeued") {
    state.status = "queued";
  } else if (event.type.startsWith("job.")) {
    state.status = event.type.slice("job.".length);
  }
  if (event.job) {
    state.job = event.job;
    state.status = event.job.status;
  }
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => reject(new DOMException("", "AbortError"));
    if (signal?.aborted) return stop();
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      stop();
    }, { once: true });
  });
}
