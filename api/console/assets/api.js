// Calls of the API with the key of this tab. The key is sent in one header and put nowhere else.

const STORED = "forebay-key";
const ROOT = new URL("v1/", document.baseURI);

let key = sessionStorage.getItem(STORED);
let onRefused = () => {};

export class ApiError extends Error {
  constructor(status, body, response) {
    const error = body?.error ?? {};
    super(error.message ?? `The server answered ${status}.`);
    this.status = status;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
    this.requestId = error.request_id ?? response.headers.get("x-request-id");
    const waitS = Number(response.headers.get("retry-after"));
    this.retryAfterMs = waitS > 0 ? waitS * 1000 : null;
  }
}

export class Unreachable extends Error {
  constructor() {
    super("The server can't be reached.");
  }
}

export const signedIn = () => key !== null;

/** What of a key may be shown: as much as the lists of keys show. */
export function shownKey() {
  const form = /^(fb_[a-z]+_.{6}).{20,}$/.exec(key ?? "");
  return form ? `${form[1]}…` : "Signed in";
}

export function whenRefused(callback) {
  onRefused = callback;
}

/** Tries the key; it is kept if the API takes it. Throws what the API says against it. */
export async function signIn(candidate, keep) {
  await get("models", {}, { as: candidate });
  key = candidate;
  if (keep) sessionStorage.setItem(STORED, candidate);
}

export function signOut() {
  key = null;
  sessionStorage.removeItem(STORED);
}

/** The response to a call that succeeded. Throws `ApiError`, or `Unreachable`. */
export async function open(method, path, { body, query, headers, signal, as = key } = {}) {
  const url = new URL(path.map(encodeURIComponent).join("/"), ROOT);
  for (const [name, value] of Object.entries(query ?? {})) {
    if (value !== "" && value !== null && value !== undefined) url.searchParams.set(name, value);
  }
  const sent = { ...headers, Authorization: `Bearer ${as}` };
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(url, {
      method, signal, headers: sent,
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "omit", cache: "no-store", redirect: "error", referrerPolicy: "no-referrer",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // A key with letters that no header can hold never leaves the browser.
    if (/[^\x21-\x7e]/.test(as)) throw new Error("An API key has letters, digits and _ only.");
    throw new Unreachable();
  }
  if (response.ok) return response;
  const shown = await response.json().catch(() => null);
  const error = new ApiError(response.status, shown, response);
  // Of a key that is only being tried, the form says it.
  if (error.status === 401 && as === key) onRefused(error);
  throw error;
}

async function json(method, path, options) {
  const response = await open(method, path, options);
  return response.status === 204 ? null : response.json();
}

export const get = (path, query, options) => json("GET", split(path), { query, ...options });
export const post = (path, body, options) => json("POST", split(path), { body, ...options });
export const remove = (path) => json("DELETE", split(path));

const split = (path) => (Array.isArray(path) ? path : path.split("/"));
