// Asks again and again, politely: not while nobody looks, slower while the server has trouble.

const TROUBLED_MS = 5000;
const SLOWEST_MS = 60_000;

export class Poller {
  #task; #failed; #timer = 0; #running = false; #busy = false; #again = false; #failures = 0;
  #seen = () => document.visibilityState === "visible" && this.now();

  /** `task()` resolves to the milliseconds until the next time; `failed(error)` gets its errors. */
  constructor(task, failed) {
    this.#task = task;
    this.#failed = failed;
  }

  start() {
    this.#running = true;
    document.addEventListener("visibilitychange", this.#seen);
    this.now();
  }

  stop() {
    this.#running = false;
    clearTimeout(this.#timer);
    document.removeEventListener("visibilitychange", this.#seen);
  }

  async now() {
    if (!this.#running) return;
    if (this.#busy) {
      this.#again = true;
      return;
    }
    clearTimeout(this.#timer);
    this.#busy = true;
    let waitMs;
    try {
      waitMs = await this.#task();
      this.#failures = 0;
    } catch (error) {
      waitMs = Math.max(error.retryAfterMs ?? 0, Math.min(SLOWEST_MS, TROUBLED_MS * 2 ** this.#failures++));
      if (this.#running) this.#failed(error);
    }
    this.#busy = false;
    if (!this.#running) return;
    if (this.#again) waitMs = 0;
    this.#again = false;
    if (document.visibilityState === "visible") this.#timer = setTimeout(() => this.now(), waitMs);
  }
}
