/** Work that is done again and again while a page is shown. */

import { pause } from "../api/images.js";

/** Does `work` now and every `ms` until `signal` is aborted; not while the tab is hidden. Errors go to `fail`. */
export async function poll(ms, signal, work, fail = () => {}) {
  while (!signal.aborted) {
    try {
      if (!document.hidden) await work();
    } catch (error) {
      if (error.name !== "AbortError") fail(error);
    }
    try {
      await pause(ms, signal);
    } catch {
      return;
    }
  }
}
