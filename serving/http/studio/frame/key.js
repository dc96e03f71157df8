/** The API key: kept for this tab only, and asked for where the server needs one. */

import { h } from "./dom.js";
import { problemBox } from "./notice.js";

const PLACE = "dreamfleet.key";
let held = read();

/** The key, or an empty text. */
export function heldKey() {
  return held;
}

/** Keeps a key until the tab is closed; an empty one is forgotten. */
export function holdKey(key) {
  held = key.trim();
  try {
    if (held) sessionStorage.setItem(PLACE, held);
    else sessionStorage.removeItem(PLACE);
  } catch {
    // the browser keeps nothing: then the key is held until the page is left
  }
}

/** Asks for a key. `message` is what the server said; `done` is called when one has been given. */
export function keyPage(message, done) {
  const field = h("input", {
    id: "key",
    type: "password",
    autocomplete: "current-password",
    placeholder: "dfk_…",
    required: true,
    spellcheck: "false",
    "aria-describedby": "key-hint",
  });
  const form = h(
    "form",
    {
      class: "panel stack key-form",
      onsubmit: (event) => {
        event.preventDefault();
        holdKey(field.value);
        done();
      },
    },
    h("h1", { tabindex: "-1" }, "Enter your key"),
    held
      ? problemBox(message)
      : h("p", { class: "muted" }, "This server asks who calls. Your key opens what is your tenant's."),
    h(
      "div",
      { class: "field" },
      h("label", { for: "key" }, "API key"),
      field,
      h("span", { class: "hint", id: "key-hint" }, "It stays in this tab, and goes to this server only."),
    ),
    h("button", { class: "button main-action" }, "Continue"),
    h(
      "p",
      { class: "small muted" },
      "No key yet? Whoever runs the server makes one: ",
      h("code", {}, "dreamfleet keys make TENANT"),
    ),
  );
  queueMicrotask(() => field.focus());
  return form;
}

function read() {
  try {
    return sessionStorage.getItem(PLACE) ?? "";
  } catch {
    return "";
  }
}
