/** A photo of a draft: what of it is kept, what the checks say, its caption. */

import { h, icon, ICONS, put } from "../frame/dom.js";
import { blobPicture } from "../pictures/picture.js";

/** The tile of a photo. `remove` takes it out, `changed` is called when its caption changes. */
export function photoTile(draft, photo, remove, changed) {
  const frame = h("span", { class: "crop", "aria-hidden": "true" });
  const image = blobPicture(photo.file, photo.name);
  let square = true; // nothing is known of its shape before it is loaded
  image.addEventListener("load", () => {
    const least = Math.min(image.naturalWidth, image.naturalHeight);
    const most = Math.max(image.naturalWidth, image.naturalHeight);
    // the picture is shown whole in a square, so the kept square is as large as its shorter side
    const side = `${(least / most) * 100}%`;
    frame.style.setProperty("width", side);
    frame.style.setProperty("height", side);
    square = least === most;
    show();
  });
  image.addEventListener("error", () =>
    image.replaceWith(h("span", { class: "muted small photo-none" }, "no preview")),
  );
  const said = h("div", { class: "photo-said" });
  const caption = h("input", {
    value: photo.caption,
    maxlength: 1000,
    placeholder: "Caption",
    "aria-label": `Caption of ${photo.name}`,
    oninput: () => {
      photo.caption = caption.value;
      draft.fresh = false;
      changed();
    },
  });
  const node = h(
    "li",
    { class: "photo" },
    h(
      "div",
      { class: "photo-picture" },
      image,
      frame,
      h(
        "button",
        { class: "photo-remove", type: "button", "aria-label": `Remove ${photo.name}`, onclick: remove },
        icon(ICONS.close, 14),
      ),
    ),
    caption,
    said,
  );

  /** Shows what the checks found, and the caption. */
  const show = () => {
    if (caption.value !== photo.caption) caption.value = photo.caption;
    frame.hidden = square || Boolean(draft.settings.train?.crop);
    const { problems, warnings } = draft.found;
    const bad = problems.filter((one) => one.name === photo.name).map((one) => one.reason);
    const poor = warnings.filter((one) => one.names.includes(photo.name));
    node.classList.toggle("bad", bad.length > 0);
    node.classList.toggle("poor", poor.length > 0);
    put(
      said,
      bad.map((text) => h("p", { class: "is-bad" }, `Not used: ${text}`)),
      poor.map((one) => h("p", { class: "is-poor", title: one.advice }, one.message)),
    );
  };
  return { node, show };
}
