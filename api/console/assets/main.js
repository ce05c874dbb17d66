// Signing in and out, and which of the views is shown.

import { shownKey, signIn, signOut, signedIn, whenRefused } from "./api.js";
import { showProblem } from "./dom.js";
import { jobsView } from "./jobs.js";
import { promptView } from "./prompt.js";
import { usageView } from "./usage.js";
import { webhooksView } from "./webhooks.js";

const VIEWS = { jobs: jobsView, prompt: promptView, webhooks: webhooksView, usage: usageView };

const element = (id) => document.getElementById(id);
const nav = document.querySelector("nav");
const who = document.querySelector(".who");
const form = document.querySelector("#sign-in form");
const view = element("view");

/** The views made since the sign-in, so that a stream goes on while another view is looked at. */
let made = {};
let shown = null;

function show({ focus = false } = {}) {
  const inside = signedIn();
  nav.hidden = who.hidden = view.hidden = !inside;
  element("sign-in").hidden = inside;
  shown?.hide?.();
  shown = null;
  if (!inside) {
    document.title = "Forebay console";
    view.replaceChildren();
    element("key").focus();
    return;
  }
  const asked = location.hash.slice(1);
  const name = Object.hasOwn(VIEWS, asked) ? asked : "jobs";
  made[name] ??= VIEWS[name]();
  shown = made[name];
  for (const link of nav.querySelectorAll("a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  element("who").textContent = shownKey();
  view.replaceChildren(shown.root);
  const title = view.querySelector("h1");
  document.title = `${title.textContent} · Forebay console`;
  if (focus) title.focus();
  shown.show?.();
}

function leave() {
  signOut();
  shown?.hide?.();
  for (const each of Object.values(made)) each.end?.();
  for (const each of document.querySelectorAll("dialog")) each.close();
  made = {};
  show();
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = element("key");
  const button = form.querySelector("button");
  const problem = element("sign-in-problem");
  button.disabled = true;
  showProblem(problem, null);
  try {
    await signIn(field.value.trim(), element("keep").checked);
    field.value = "";
    field.removeAttribute("aria-invalid");
    show({ focus: true });
  } catch (error) {
    showProblem(problem, error);
    field.setAttribute("aria-invalid", "true");
    field.focus();
    field.select();
  } finally {
    button.disabled = false;
  }
});

element("sign-out").addEventListener("click", leave);
whenRefused((error) => {
  leave();
  showProblem(element("sign-in-problem"), error);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  // The address names the view, not a place in it.
  event.preventDefault();
  element("main").focus();
});
addEventListener("hashchange", () => show({ focus: true }));
show();
