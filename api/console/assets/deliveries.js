// What was delivered to an endpoint, and once more.

import { get, post } from "./api.js";
import { action, h, notify, showProblem } from "./dom.js";
import { duration, moment } from "./format.js";

const PAGE = 25;
const SHOWN = { pending: "queued", delivered: "completed", failed: "failed", discarded: "expired" };

export function deliveriesList() {
  const title = h("h2", { tabindex: "-1" });
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const body = h("tbody", { role: "rowgroup" });
  const empty = h("p", { class: "empty" }, "Nothing was sent yet.");
  const columns = ["State", "Event", "Job", "Created", "Attempts", "Last answer", ""];
  const table = h("table", { role: "table", "aria-label": "Deliveries, newest first" },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ...columns.map((name) =>
      h("th", { scope: "col", role: "columnheader" }, name || h("span", { class: "unseen" }, "Actions"))))),
    body);
  let endpointId = null;
  let last = null;
  const more = action("More", { place: problem }, () => load({ more: true }));
  const root = h("section", { class: "card", hidden: true, "aria-label": "Deliveries" },
    h("div", { class: "head" }, title, h("div", { class: "actions" },
      action("Refresh", { place: problem }, () => load()),
      action("Close", {}, () => close(endpointId)))),
    problem, table, empty, h("div", { class: "actions end" }, more));

  async function load({ more: further = false } = {}) {
    const query = { limit: PAGE, after: further ? last : null };
    const page = await get(["webhook_endpoints", endpointId, "deliveries"], query);
    const made = page.data.map((each) => row(each, columns, { problem, load }));
    if (further) body.append(...made);
    else body.replaceChildren(...made);
    last = page.last_id;
    more.hidden = !page.has_more;
    empty.hidden = body.children.length > 0;
    table.hidden = !empty.hidden;
  }

  async function open(id, label) {
    endpointId = id;
    title.textContent = `Deliveries to ${label}`;
    body.replaceChildren();
    showProblem(problem, null);
    root.hidden = false;
    await load();
    title.focus();
  }

  function close(id) {
    if (id !== endpointId) return;
    endpointId = null;
    root.hidden = true;
  }

  return { root, open, close, load, shows: (id) => id === endpointId };
}

function row(delivery, columns, { problem, load }) {
  const tried = delivery.attempts.at(-1);
  const answer = !tried ? "–" : `${tried.status_code ?? tried.error} in ${duration(tried.duration_ms)}`;
  const next = delivery.next_attempt_at ? `, next ${moment(delivery.next_attempt_at)}` : "";
  const again = action("Redeliver", { place: problem, name: `Redeliver ${delivery.id}` }, async () => {
    await post(["webhook_deliveries", delivery.id, "redeliver"]);
    notify("It is being sent once more.");
    await load();
  });
  const cells = [
    h("span", { class: `badge ${SHOWN[delivery.state]}` }, delivery.state),
    h("code", {}, delivery.event_type),
    delivery.job_id ? h("code", { title: delivery.job_id }, `…${delivery.job_id.slice(-8)}`) : "–",
    moment(delivery.created_at),
    `${delivery.attempts.length}${next}`,
    answer,
    delivery.state === "pending" ? "" : again,
  ];
  return h("tr", { role: "row", "data-delivery": delivery.id },
    ...cells.map((cell, index) => h("td", { role: "cell", "data-label": columns[index] }, cell)));
}
