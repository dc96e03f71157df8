/** What the owner of an adapter may do with it as a whole: who sees it, what prompts say, files of it, its end. */

import { changeAdapter, deleteAdapter, exportPath } from "../api/adapters.js";
import { send } from "../api/http.js";
import { h, icon, ICONS } from "../frame/dom.js";
import { confirmed } from "../frame/dialog.js";
import { field } from "../frame/fields.js";
import { notify, tell } from "../frame/notice.js";
import { go } from "../frame/router.js";
import { download } from "../pictures/picture.js";

const FORMATS = [
  ["diffusers", "Diffusers", "load_lora_weights of diffusers, ComfyUI"],
  ["kohya", "Kohya", "AUTOMATIC1111, Forge, ComfyUI, SwarmUI"],
  ["peft", "PEFT", "a folder for PEFT, as a zip"],
  ["lora_diffusion", "lora_diffusion", "the package of that name"],
];

/** Trigger, visibility and deletion. */
export function ownerPanel(adapter) {
  const trigger = h("input", { value: adapter.trigger, maxlength: 1000, placeholder: "sks dog" });
  const isPublic = h("input", {
    type: "checkbox",
    checked: adapter.public,
    onchange: () =>
      change(
        { public: isPublic.checked },
        isPublic.checked ? "Every tenant may generate with it now." : "Only your tenant sees it now.",
      ),
  });

  async function change(what, said) {
    try {
      await changeAdapter(adapter.id, what);
      notify(said);
    } catch (error) {
      if ("public" in what) isPublic.checked = !what.public;
      tell(error);
    }
  }

  async function remove() {
    const sure = await confirmed(
      `Delete ${adapter.id}?`,
      "All its versions, samples and scores are deleted for good. Pictures that were drawn with it stay.",
      "Delete it",
    );
    if (!sure) return;
    try {
      await deleteAdapter(adapter.id);
      notify(`${adapter.id} is deleted.`);
      go("#/adapters");
    } catch (error) {
      tell(error);
    }
  }

  const save = (event) => {
    event.preventDefault();
    void change({ trigger: trigger.value }, "The trigger is saved.");
  };
  return h(
    "section",
    { class: "panel stack", "aria-label": "Sharing" },
    h("h2", {}, "Sharing"),
    h("label", { class: "check" }, isPublic, "Public: other tenants may generate with it"),
    h(
      "form",
      { class: "joined end", onsubmit: save },
      field("Trigger", trigger, "What its prompts say."),
      h("button", { class: "button" }, "Save"),
    ),
    h(
      "div",
      {},
      h(
        "button",
        { class: "button danger", type: "button", onclick: remove },
        icon(ICONS.trash, 16),
        "Delete this adapter",
      ),
    ),
  );
}

/** Its files for other programs. */
export function downloadsPanel(adapter) {
  const take = async (format, button) => {
    button.disabled = true;
    try {
      const response = await send("GET", exportPath(adapter.id, adapter.version, format));
      const [, name] = /filename="(.*?)"/.exec(response.headers.get("content-disposition") ?? "") ?? [];
      download(await response.blob(), name ?? `${adapter.id}.safetensors`);
    } catch (error) {
      tell(error);
    } finally {
      button.disabled = false;
    }
  };
  return h(
    "section",
    { class: "panel", "aria-label": "Download" },
    h("h2", {}, "Download"),
    h(
      "ul",
      { class: "downloads" },
      FORMATS.map(([format, name, says]) =>
        h(
          "li",
          {},
          h("div", {}, h("b", {}, name), h("span", { class: "muted small" }, says)),
          h(
            "button",
            {
              class: "button icon",
              type: "button",
              "aria-label": `Download for ${name}`,
              onclick: (event) => take(format, event.currentTarget),
            },
            icon(ICONS.download),
          ),
        ),
      ),
    ),
  );
}
