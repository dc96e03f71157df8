/** Dialogs: the browser's own, which hold the focus, close with Escape, and give the focus back. */

import { h, icon, ICONS } from "./dom.js";

/** Opens a dialog. `make` gets a function that closes it with a result; resolves to that, or undefined. */
export function openDialog(title, make, { wide = false, bare = false } = {}) {
  return new Promise((resolve) => {
    let result;
    const close = (value) => {
      result = value;
      dialog.close();
    };
    const head = h(
      "div",
      { class: "dialog-head" },
      h("h2", { id: "dialog-title" }, title),
      h(
        "button",
        { class: "button quiet icon small", type: "button", "aria-label": "Close", onclick: () => close() },
        icon(ICONS.close),
      ),
    );
    const dialog = h("dialog", {
      class: wide ? "wide" : null,
      ...(bare ? { "aria-label": title } : { "aria-labelledby": "dialog-title" }),
      onclose: () => {
        dialog.remove();
        resolve(result);
      },
      onclick: (event) => event.target === dialog && close(),
    });
    dialog.append(
      ...(bare ? [] : [head]),
      h("div", { class: bare ? "dialog-bare" : "dialog-body" }, make(close, dialog)),
    );
    document.body.append(dialog);
    addEventListener("hashchange", () => dialog.close(), { once: true });
    dialog.showModal();
  });
}

/** Asks before something is done that cannot be undone; whether it shall be done. */
export async function confirmed(title, text, action) {
  const answer = await openDialog(title, (close) => [
    h("p", {}, text),
    h(
      "div",
      { class: "dialog-end" },
      h("button", { class: "button", type: "button", autofocus: true, onclick: () => close(false) }, "Cancel"),
      h("button", { class: "button danger main-action", type: "button", onclick: () => close(true) }, action),
    ),
  ]);
  return answer === true;
}
