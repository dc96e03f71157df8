/** The gallery: every adapter that the caller may use, by its pictures. */

import { listAdapters, uploadAdapter } from "../api/adapters.js";
import { server } from "../api/server.js";
import { portrait } from "../create/picker.js";
import { h, icon, ICONS, put } from "../frame/dom.js";
import { openDialog } from "../frame/dialog.js";
import { field } from "../frame/fields.js";
import { count, when } from "../frame/format.js";
import { problemBox, notify } from "../frame/notice.js";
import { go, link } from "../frame/router.js";

/** The page. */
export async function adaptersPage({ signal }) {
  const [{ trains, caller }, adapters] = await Promise.all([server(), listAdapters({ signal })]);
  const grid = h("ul", { class: "gallery" });
  const search = h("input", { type: "search", placeholder: "Search", "aria-label": "Search adapters", oninput: show });

  function show() {
    const words = search.value.trim().toLowerCase();
    const found = adapters.filter((one) => `${one.tenant}/${one.id} ${one.trigger}`.toLowerCase().includes(words));
    put(
      grid,
      found.map((one) => tile(one, caller)),
      !found.length && h("li", { class: "muted" }, `No adapter matches “${search.value}”.`),
    );
  }
  show();
  const head = h(
    "div",
    { class: "page-head" },
    h(
      "div",
      {},
      h("h1", { tabindex: "-1" }, "Adapters"),
      h("p", {}, adapters.length ? count(adapters.length, "adapter") : "What the server has learned of subjects."),
    ),
    h(
      "div",
      { class: "page-head-actions" },
      adapters.length > 6 && search,
      h("button", { class: "button", type: "button", onclick: upload }, icon(ICONS.plus, 16), "Upload"),
      trains && h("a", { class: "button main-action", href: "#/subjects" }, "Train a subject"),
    ),
  );
  return h("div", {}, head, adapters.length ? grid : nothing(trains));
}

function tile(adapter, caller) {
  const foreign = caller && adapter.tenant !== caller.tenant;
  return h(
    "li",
    {},
    h(
      "a",
      { class: "gallery-tile", href: link(["adapters", adapter.tenant, adapter.id]) },
      portrait(adapter, "portrait large"),
      h(
        "span",
        { class: "gallery-name" },
        h("b", {}, adapter.id),
        foreign
          ? h("span", { class: "tag" }, adapter.tenant)
          : adapter.public && h("span", { class: "tag accent" }, "public"),
      ),
      h(
        "span",
        { class: "muted small" },
        [adapter.trigger && `“${adapter.trigger}”`, when(adapter.created)].filter(Boolean).join(" · "),
      ),
    ),
    h(
      "a",
      {
        class: "button small gallery-draw",
        href: link(["create"], { adapter: `${adapter.tenant}/${adapter.id}` }),
        "aria-label": `Draw with ${adapter.id}`,
      },
      "Draw",
    ),
  );
}

function nothing(trains) {
  return h(
    "div",
    { class: "empty" },
    h("h2", {}, "No adapters yet"),
    h(
      "p",
      {},
      "Train a subject on 5 to 20 photos, or upload a LoRA that was made for this base: safetensors of diffusers, PEFT or kohya.",
    ),
    h(
      "div",
      { class: "actions" },
      trains && h("a", { class: "button main-action", href: "#/subjects" }, "Train a subject"),
      h("button", { class: "button", type: "button", onclick: upload }, "Upload an adapter"),
    ),
    !trains && h("pre", {}, "dreamfleet train manifest.yaml"),
  );
}

function upload() {
  return openDialog("Upload an adapter", (close) => {
    const file = h("input", {
      type: "file",
      accept: ".safetensors",
      required: true,
      onchange: () => {
        if (!id.value)
          id.value = (file.files[0]?.name ?? "")
            .replace(/\.safetensors$/, "")
            .toLowerCase()
            .replace(/[^a-z0-9._-]+/g, "-")
            .replace(/^[^a-z0-9]+/, "")
            .slice(0, 63);
      },
    });
    const id = h("input", { required: true, maxlength: 63, placeholder: "rusty", spellcheck: "false" });
    const trigger = h("input", { maxlength: 1000, placeholder: "sks dog" });
    const isPublic = h("input", { type: "checkbox" });
    const problems = h("div");
    const button = h("button", { class: "button main-action" }, "Upload");
    const submit = async (event) => {
      event.preventDefault();
      button.disabled = true;
      put(problems);
      try {
        const made = await uploadAdapter({
          file: file.files[0],
          id: id.value,
          trigger: trigger.value,
          isPublic: isPublic.checked,
        });
        close();
        notify(`${made.id} is ready.`);
        go(link(["adapters", made.tenant, made.id]));
      } catch (error) {
        put(problems, problemBox(error));
        button.disabled = false;
      }
    };
    return h(
      "form",
      { class: "stack", onsubmit: submit },
      field("File", file, "Safetensors of diffusers, PEFT or kohya, made for this base."),
      field("Id", id, "Lower case letters, digits, . _ and -. An adapter of yours with this id gets a new version."),
      field("Trigger", trigger, "What its prompts say."),
      h("label", { class: "check" }, isPublic, "Public: other tenants may generate with it"),
      problems,
      h("div", { class: "dialog-end" }, button),
    );
  });
}
