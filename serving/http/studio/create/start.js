/** The picture to start from: dropped, chosen, pasted, or taken from the history. */

import { h, icon, ICONS, put } from "../frame/dom.js";
import { slider } from "../frame/fields.js";
import { decimal } from "../frame/format.js";
import { blobPicture } from "../pictures/picture.js";

/** The field of `draft.start` and `draft.strength`, with a `show` to draw it again. */
export function startField(draft, changed) {
  const box = h("div", { class: "field" });
  const set = (blob) => {
    draft.start = blob;
    box.show();
    changed();
  };
  const take = (files) => {
    const found = [...files].find((file) => file.type.startsWith("image/"));
    if (found) set(found);
  };
  const input = h("input", {
    type: "file",
    accept: "image/*",
    class: "sr",
    "aria-label": "Picture to start from",
    onchange: () => take(input.files),
  });

  box.show = () => {
    const label = h("span", { class: "label" }, "Start from a picture");
    if (!draft.start) {
      put(
        box,
        label,
        h(
          "label",
          {
            class: "drop",
            ondragover: allow,
            ondragleave: leave,
            ondrop: (event) => {
              leave(event);
              event.preventDefault();
              take(event.dataTransfer.files);
            },
          },
          icon(ICONS.picture, 20),
          h("span", {}, "Drop a picture, or choose one"),
          input,
        ),
      );
      return;
    }
    const shown = h("output", { class: "numeric" }, decimal(draft.strength));
    const bar = slider("How much is redrawn", draft.strength, { min: 0.05, max: 1, step: 0.05 }, (strength) => {
      draft.strength = strength;
      shown.textContent = decimal(strength);
      changed();
    });
    put(
      box,
      label,
      h(
        "div",
        { class: "start" },
        blobPicture(draft.start, "The picture to start from"),
        h("div", {}, h("div", { class: "spread small" }, h("span", { class: "muted" }, "Redrawn"), shown), bar),
        h(
          "button",
          {
            class: "button quiet icon small",
            type: "button",
            "aria-label": "Start from noise",
            onclick: () => set(null),
          },
          icon(ICONS.close, 15),
        ),
      ),
    );
  };
  box.show();
  return box;
}

function allow(event) {
  event.preventDefault();
  event.currentTarget.classList.add("over");
}

function leave(event) {
  event.currentTarget.classList.remove("over");
}
