// Registered endpoints: made, tested, changed; a secret is seen once.

import { get, post, remove } from "./api.js";
import { deliveriesList } from "./deliveries.js";
import { action, confirmed, h, notify, showProblem } from "./dom.js";
import { moment } from "./format.js";

const EVENTS = [
  "job.completed", "job.failed", "job.cancelled", "job.expired",
  "response.completed", "response.failed", "response.cancelled", "response.incomplete",
  "batch.completed", "batch.failed", "batch.expired", "batch.cancelled",
  "webhook_endpoint.disabled",
];
const WHY = { gone: "it answered 410", failing: "it failed for too long", owner: "switched off" };

export function webhooksView() {
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const secret = h("div", { hidden: true });
  const list = h("div", { class: "stack", "aria-live": "off" });
  const log = deliveriesList();

  const url = h("input", { id: "hook-url", type: "url", required: true, maxlength: "2048", placeholder: "https://example.com/hook" });
  const name = h("input", { id: "hook-name", maxlength: "100", autocomplete: "off" });
  const events = EVENTS.map((value) => h("input", { type: "checkbox", value, checked: true }));
  const withOutput = h("input", { type: "checkbox" });
  const field = (label, control) => h("div", { class: "field" }, h("label", { for: control.id }, label), control);
  const formProblem = h("p", { class: "problem", role: "alert", hidden: true });
  const form = h("form", { onsubmit: create },
    h("div", { class: "fields" }, field("URL", url), field("Name (optional)", name)),
    h("fieldset", {}, h("legend", {}, "Events"),
      ...events.map((box) => h("label", { class: "check" }, box, " ", h("code", {}, box.value)))),
    h("label", { class: "check" }, withOutput, " Send the output along"),
    formProblem,
    h("div", { class: "actions" }, h("button", { type: "submit", class: "primary" }, "Create endpoint")));
  const creating = h("details", { class: "card" }, h("summary", {}, "New endpoint"), form);

  async function create(event) {
    event.preventDefault();
    showProblem(formProblem, null);
    try {
      const chosen = events.filter((box) => box.checked).map((box) => box.value);
      const made = await post("webhook_endpoints", {
        url: url.value, name: name.value, include_output: withOutput.checked,
        event_types: chosen.length === EVENTS.length ? ["*"] : chosen,
      });
      form.reset();
      creating.open = false;
      showSecret(secret, made);
      await load();
    } catch (error) {
      showProblem(formProblem, error);
    }
  }

  async function load() {
    showProblem(problem, null);
    try {
      const found = (await get("webhook_endpoints", { limit: 100 })).data;
      list.replaceChildren(...found.map((endpoint) => card(endpoint, { problem, secret, load, log })));
      if (!found.length) {
        list.append(h("p", { class: "card empty" }, "No endpoint is registered yet."));
        creating.open = true;
      }
    } catch (error) {
      showProblem(problem, error);
    }
  }

  const root = h("div", { class: "stack" }, h("h1", { tabindex: "-1" }, "Webhooks"), problem, secret, list, creating, log.root);
  return { root, show: load, hide: () => secret.replaceChildren(), end: () => secret.replaceChildren() };
}

function card(endpoint, { problem, secret, load, log }) {
  const path = ["webhook_endpoints", endpoint.id];
  const label = endpoint.name || endpoint.url;
  const button = (text, kind, work) => action(text, { kind, place: problem, name: `${text}: ${label}` }, work);
  const answer = h("p", { class: "state", role: "status", "aria-live": "polite" });
  const state = endpoint.enabled ? ["completed", "on"] : ["failed", "off"];
  const notes = [
    !endpoint.enabled && `Off: ${WHY[endpoint.disabled_reason] ?? endpoint.disabled_reason}.`,
    endpoint.failing_since && `Failing since ${moment(endpoint.failing_since)}.`,
    endpoint.last_success_at && `Last success ${moment(endpoint.last_success_at)}.`,
    endpoint.previous_secret_until && `The old secret signs as well until ${moment(endpoint.previous_secret_until)}.`,
  ].filter(Boolean).join(" ");
  return h("article", { class: "card endpoint", "data-endpoint": endpoint.id },
    h("div", { class: "head" },
      h("h2", {}, label, " ", h("span", { class: `badge ${state[0]}` }, state[1])),
      h("code", { class: "dim" }, endpoint.id)),
    h("p", { class: "address" }, h("code", {}, endpoint.url)),
    h("p", { class: "dim" }, endpoint.event_types.map((type) => (type === "*" ? "all events" : type)).join(", "),
      endpoint.include_output ? ", with output" : "", notes ? ` · ${notes}` : ""),
    answer,
    h("div", { class: "actions" },
      button("Send test", "primary", async () => {
        answer.textContent = "Sending …";
        try {
          const sent = await post([...path, "test"]);
          answer.textContent = sent.success ? `Delivered: it answered ${sent.status_code}.`
            : `Not delivered: ${sent.status_code ? `it answered ${sent.status_code}` : sent.error}.`;
        } catch (error) {
          answer.textContent = "";
          throw error;
        }
        if (log.shows(endpoint.id)) await log.load();
      }),
      button("Deliveries", "quiet", () => log.open(endpoint.id, label)),
      button(endpoint.enabled ? "Switch off" : "Switch on", "quiet", async () => {
        await post(path, { enabled: !endpoint.enabled });
        await load();
      }),
      button("New secret", "quiet", async () => {
        if (!await confirmed("Make a new secret? For a day messages carry both signatures.", "Make a new one")) return;
        showSecret(secret, await post([...path, "rotate_secret"]));
        await load();
      }),
      button("Delete", "danger", async () => {
        if (!await confirmed(`Delete ${label}? What waits for it is not sent any more.`, "Delete")) return;
        await remove(path);
        notify("The endpoint was deleted.");
        log.close(endpoint.id);
        await load();
      })));
}

/** Held by this element alone, which goes when it is dismissed or the view is left. */
function showSecret(place, { signing_secret: secret }) {
  const dismiss = action("I have stored it", {}, () => {
    place.replaceChildren();
    place.hidden = true;
  });
  const shown = h("code", { class: "secret", tabindex: "0" }, secret);
  place.replaceChildren(h("section", { class: "card notice", "aria-label": "Signing secret" },
    h("h2", { tabindex: "-1" }, "Signing secret"),
    h("p", {}, "Shown only this once. Your server checks the signatures of messages with it."),
    shown,
    h("div", { class: "actions" },
      action("Copy", { kind: "primary" }, async () => {
        await navigator.clipboard.writeText(secret);
        notify("Copied.");
      }), dismiss)));
  place.hidden = false;
  place.querySelector("h2").focus();
}
