// Elements made without markup in strings: whatever is put in comes out as text.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. `props`: `on…` functions become listeners, true an empty attribute, false and null
 * none. Children are elements or text.
 */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Writes only what differs, so that a refresh disturbs neither selection nor screen reader. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

let spoken = 0;

/** A short message at the edge of the page, for a while. */
export function notify(text) {
  const place = document.getElementById("said");
  const mine = ++spoken;
  place.textContent = text;
  setTimeout(() => {
    if (mine === spoken) place.textContent = "";
  }, 6000);
}

/** Puts an error where it belongs, in the API's own words; null takes it away. */
export function showProblem(place, error) {
  place.hidden = error === null;
  place.textContent = error === null ? "" : describe(error);
}

export function describe(error) {
  const parts = [error.message];
  if (error.param) parts.push(`(${error.param})`);
  if (error.code) parts.push(`· ${error.code}`);
  if (error.requestId) parts.push(`· ${error.requestId}`);
  return parts.join(" ");
}

/** A question in a dialog of its own; resolves to whether it was affirmed. */
export function confirmed(question, verb) {
  return new Promise((resolve) => {
    const dialog = h("dialog", { class: "card ask", "aria-labelledby": "question" },
      h("form", { method: "dialog" },
        h("p", { id: "question" }, question),
        h("div", { class: "actions" },
          h("button", { value: "no", class: "quiet", autofocus: true }, "Keep"),
          h("button", { value: "yes", class: "danger" }, verb))));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Runs a button's action once at a time; what goes wrong is shown in `place`. */
export function action(label, { kind = "quiet", place, name }, work) {
  const button = h("button", { type: "button", class: kind, "aria-label": name ?? null }, label);
  button.addEventListener("click", async () => {
    if (button.getAttribute("aria-disabled")) return;
    button.setAttribute("aria-disabled", "true");
    if (place) showProblem(place, null);
    try {
      await work(button);
    } catch (error) {
      if (place?.isConnected) showProblem(place, error);
      else notify(describe(error));
    } finally {
      button.removeAttribute("aria-disabled");
    }
  });
  return button;
}
