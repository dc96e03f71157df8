/** The dialog in which an adapter is chosen. */

import { listAdapters, samplePaths } from "../api/adapters.js";
import { server } from "../api/server.js";
import { h, put } from "../frame/dom.js";
import { openDialog } from "../frame/dialog.js";
import { problemBox } from "../frame/notice.js";
import { picture } from "../pictures/picture.js";

/** Whether an adapter is the caller's own; only then its files may be read. */
export async function isMine(adapter) {
  const { caller } = await server();
  return caller === null || adapter.tenant === caller.tenant;
}

/** The first sample of an adapter as an img; a letter on a coloured ground where there is none to be seen. */
export function portrait(adapter, className = "portrait") {
  const hue = [...adapter.id].reduce((sum, letter) => (sum * 31 + letter.charCodeAt(0)) % 360, 7);
  const box = h(
    "span",
    { class: className, "aria-hidden": "true", style: { "--hue": hue } },
    h("b", {}, adapter.id.slice(0, 1).toUpperCase()),
  );
  const shown = picture(async () =>
    adapter.version && (await isMine(adapter)) ? (await samplePaths(adapter.id, adapter.version))[0] : null,
  );
  shown.addEventListener("load", () => box.classList.add("shown"));
  box.append(shown);
  return box;
}

/** Asks for an adapter; resolves to it, or undefined. `taken` are names that need not be offered. */
export function pickAdapter(taken = []) {
  return openDialog("Choose an adapter", (close) => {
    const list = h("div", { class: "picker-list" }, h("div", { class: "loading" }, h("span", { class: "spinner" })));
    const search = h("input", { type: "search", placeholder: "Search", "aria-label": "Search adapters" });
    listAdapters().then(
      (adapters) => {
        const offered = adapters.filter((one) => !taken.includes(`${one.tenant}/${one.id}`));
        const show = () => {
          const words = search.value.toLowerCase();
          const found = offered.filter((one) => `${one.tenant}/${one.id} ${one.trigger}`.toLowerCase().includes(words));
          put(
            list,
            found.map((one) => row(one, close)),
            !found.length && h("p", { class: "muted" }, emptyText(adapters, offered)),
          );
        };
        search.addEventListener("input", show);
        search.addEventListener("keydown", (event) => {
          if (event.key === "Enter") list.querySelector("button")?.click();
        });
        show();
      },
      (error) => put(list, problemBox(error)),
    );
    queueMicrotask(() => search.focus());
    return [search, list];
  });
}

function row(adapter, close) {
  return h(
    "button",
    { class: "picker-row", type: "button", onclick: () => close(adapter) },
    portrait(adapter),
    h(
      "span",
      {},
      h("b", {}, adapter.id),
      h("span", { class: "muted small" }, adapter.trigger || `of ${adapter.tenant}`),
    ),
  );
}

function emptyText(adapters, offered) {
  if (!adapters.length) return "There are no adapters yet: train a subject, or upload an adapter.";
  return offered.length ? "No adapter matches." : "All adapters are chosen.";
}
