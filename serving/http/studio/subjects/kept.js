/** The photos that the server keeps: what was uploaded, to be deleted when it is needed no more. */

import { deletePhotos, listPhotos } from "../api/training.js";
import { h, icon, ICONS, put } from "../frame/dom.js";
import { confirmed } from "../frame/dialog.js";
import { bytes, count, when } from "../frame/format.js";
import { tell } from "../frame/notice.js";
import { allDrafts } from "./draft.js";

/** The panel; it reads the list when it is opened. */
export function keptPanel() {
  const list = h("ul", { class: "versions" });
  const show = async () => {
    const drafted = allDrafts().map((draft) => draft.info?.id);
    const found = (await listPhotos()).filter((one) => !drafted.includes(one.id));
    put(
      list,
      found.map((one) => row(one, show)),
      !found.length && h("li", { class: "muted" }, "None: nothing has been trained from here, or all is deleted."),
    );
  };
  const panel = h(
    "details",
    { class: "panel more kept", ontoggle: () => panel.open && show().catch(tell) },
    h("summary", {}, "Photos that the server keeps"),
    h("div", {}, list),
  );
  return panel;
}

function row(file, show) {
  const photos = file.subjects.reduce((sum, one) => sum + one.photos, 0);
  const remove = async () => {
    const text = "The photos and captions are deleted for good. Adapters that were trained on them stay.";
    if (!(await confirmed(`Delete ${file.filename}?`, text, "Delete them"))) return;
    try {
      await deletePhotos(file.id);
      await show();
    } catch (error) {
      tell(error);
    }
  };
  return h(
    "li",
    {},
    h(
      "div",
      {},
      h("b", {}, file.filename),
      h("div", { class: "muted small" }, `${count(photos, "photo")} · ${bytes(file.bytes)} · ${when(file.created_at)}`),
    ),
    h(
      "button",
      { class: "button quiet icon small", type: "button", "aria-label": `Delete ${file.filename}`, onclick: remove },
      icon(ICONS.trash, 16),
    ),
  );
}
