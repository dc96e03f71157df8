/** A picture by itself, large, with everything that made it. */

import { h, icon, ICONS, put } from "../frame/dom.js";
import { openDialog } from "../frame/dialog.js";
import { date } from "../frame/format.js";
import { blobPicture, download, picture } from "./picture.js";

const LARGEST = 8; // times its own size: beyond, a small picture is only a blur

/**
 * Shows `items` one at a time from `at`: {blob or path, title, facts: [[name, value]], name, actions: [[text, do]]}.
 * Arrow keys go on; an action closes the viewer.
 */
export function view(items, at = 0) {
  return openDialog(
    "Picture",
    (close, dialog) => {
      dialog.classList.add("viewer");
      const stage = h("div", { class: "viewer-stage" });
      const side = h("div", { class: "viewer-side" });
      let now = at;
      const step = (by) => {
        now = (now + by + items.length) % items.length;
        show();
      };
      const arrow = (by, text, path) =>
        items.length > 1 &&
        h(
          "button",
          {
            class: `viewer-arrow ${by < 0 ? "left" : "right"}`,
            type: "button",
            "aria-label": text,
            onclick: () => step(by),
          },
          icon(path, 22),
        );
      const show = () => {
        const item = items[now];
        const image = item.blob ? blobPicture(item.blob, item.title) : picture(() => item.path, item.title);
        image.addEventListener("load", () => {
          image.style.setProperty("max-width", `${image.naturalWidth * LARGEST}px`);
          image.style.setProperty("max-height", `${image.naturalHeight * LARGEST}px`);
        });
        put(stage, image, arrow(-1, "Previous picture", ICONS.back), arrow(1, "Next picture", ICONS.next));
        put(side, sideOf(item, close, items.length > 1 ? `${now + 1} of ${items.length}` : null));
      };
      dialog.addEventListener("keydown", (event) => {
        if (items.length < 2 || event.target.matches("input, textarea, select")) return;
        if (event.key === "ArrowRight") step(1);
        if (event.key === "ArrowLeft") step(-1);
      });
      show();
      return [stage, side];
    },
    { bare: true },
  );
}

function sideOf(item, close, place) {
  const act = (work) => () => {
    close();
    work();
  };
  return [
    h(
      "div",
      { class: "spread" },
      h("span", { class: "muted small" }, place ?? (item.time ? date(item.time / 1000) : "")),
      h(
        "button",
        { class: "button quiet icon small", type: "button", "aria-label": "Close", onclick: () => close() },
        icon(ICONS.close),
      ),
    ),
    h("p", { class: "viewer-title" }, item.title),
    h(
      "dl",
      { class: "facts" },
      (item.facts ?? []).filter(([, value]) => value).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
    ),
    h(
      "div",
      { class: "viewer-actions" },
      (item.actions ?? []).map(([text, work, kind = ""]) =>
        h("button", { class: `button ${kind}`, type: "button", onclick: act(work) }, text),
      ),
      item.blob &&
        h(
          "button",
          { class: "button", type: "button", onclick: () => download(item.blob, item.name) },
          icon(ICONS.download),
          "Download",
        ),
    ),
  ];
}
