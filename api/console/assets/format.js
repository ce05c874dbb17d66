// Figures and times as people read them.

const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const DAY = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium", hourCycle: "h23" });
const WHOLE = new Intl.NumberFormat("en");

export const number = (value) => WHOLE.format(value);

/** Of milliseconds: `3 ms`, `1.4 s`, `2 min 5 s`, `3 h 2 min`. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 10_000) return `${(ms / 1000).toFixed(1)} s`;
  const seconds = Math.round(ms / 1000);
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

/** Of Unix seconds: the time today, else with its day. */
export function moment(unixS) {
  if (!unixS) return "–";
  const date = new Date(unixS * 1000);
  const today = new Date().toDateString() === date.toDateString();
  return (today ? CLOCK : DAY).format(date);
}

const WORDS = { in_progress: "running" };
export const status = (value) => WORDS[value] ?? value;

const ENDED = new Set(["completed", "failed", "cancelled", "expired"]);
export const hasEnded = (job) => ENDED.has(job.status);

/** What was generated: the text of a chat or completion, else the output as JSON. */
export function outputText(output) {
  if (!output) return "";
  const choice = output.choices?.[0];
  const text = choice?.message?.content ?? choice?.text;
  if (typeof text === "string") return text;
  const parts = (output.output ?? []).flatMap((item) => item.content ?? []).map((part) => part.text);
  return parts.length ? parts.join("") : JSON.stringify(output, null, 2).slice(0, 20_000);
}

/** The value below which a share of the sorted values lies. */
export function quantile(sorted, share) {
  if (!sorted.length) return null;
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}
