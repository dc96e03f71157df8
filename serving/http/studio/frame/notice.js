/** What is told to the person: a problem in its place, or a short notice at the edge. */

import { h, icon, ICONS } from "./dom.js";

const SHOWN_MS = 5000;
let holder = null;

/** Says something for a moment. `bad` stays until it is closed. */
export function notify(text, { bad = false } = {}) {
  if (holder === null) {
    holder = h("div", { class: "notices", role: "status", "aria-live": "polite" });
    document.body.append(holder);
  }
  const close = () => note.remove();
  const note = h(
    "div",
    { class: "notice" },
    h("p", {}, text),
    h(
      "button",
      { class: "button quiet icon small", type: "button", "aria-label": "Close", onclick: close },
      icon(ICONS.close, 15),
    ),
  );
  // a dialog lies over everything else, so a notice must lie in it
  (document.querySelector("dialog[open]:last-of-type") ?? document.body).append(holder);
  holder.append(note);
  if (!bad) setTimeout(close, SHOWN_MS);
}

/** The box of a problem: an error, or the text of one. `kind`: bad, warn or good. */
export function problemBox(problem, kind = "bad") {
  const text = typeof problem === "string" ? problem : problem.message;
  const mark = icon(kind === "good" ? ICONS.good : ICONS.warning);
  return h("div", { class: `problem ${kind}`, role: kind === "bad" ? "alert" : "note" }, mark, h("p", {}, text));
}

/** Says what went wrong; that somebody stopped it is no problem. */
export function tell(error) {
  if (error?.name !== "AbortError") notify(error?.message ?? String(error), { bad: true });
}
