/** The adapters of a draft, each with its weight. */

import { listAdapters } from "../api/adapters.js";
import { h, icon, ICONS, put } from "../frame/dom.js";
import { slider } from "../frame/fields.js";
import { decimal, short } from "../frame/format.js";
import { tell } from "../frame/notice.js";
import { pickAdapter, portrait } from "./picker.js";

/** The list of `draft.adapters`, with a `show` to draw it again. `added` is called with an adapter that was picked; `twice`: one may be in it twice. */
export function mixField(draft, defaults, changed, { added = () => {}, twice = false } = {}) {
  const rows = h("ul", { class: "mix" });
  const add = h(
    "button",
    { class: "button small", type: "button", onclick: pick },
    icon(ICONS.plus, 16),
    "Add adapter",
  );
  const box = h(
    "div",
    { class: "field", role: "group", "aria-label": "Adapters" },
    h("span", { class: "label" }, "Adapters"),
    rows,
    h("div", { class: "row" }, add),
  );
  let known = new Map();

  async function pick() {
    const adapter = await pickAdapter(twice ? [] : draft.adapters.map((one) => one.id.split("@")[0]));
    if (!adapter) return;
    known.set(`${adapter.tenant}/${adapter.id}`, adapter);
    draft.adapters.push({ id: `${adapter.tenant}/${adapter.id}`, weight: 1 });
    show();
    changed();
    added(adapter);
  }

  function show() {
    put(
      rows,
      draft.adapters.map((one) =>
        mixRow(one, known.get(one.id.split("@")[0]), defaults, changed, () => {
          draft.adapters.splice(draft.adapters.indexOf(one), 1);
          show();
          changed();
          add.focus();
        }),
      ),
    );
    add.hidden = draft.adapters.length >= defaults.largest_adapters;
  }

  show();
  listAdapters().then((adapters) => {
    known = new Map(adapters.map((one) => [`${one.tenant}/${one.id}`, one]));
    show();
  }, tell);
  box.show = show;
  return box;
}

function mixRow(one, adapter, defaults, changed, remove) {
  const [name, version] = one.id.split("@");
  const id = name.split("/").at(-1);
  const most = Math.min(2, defaults.largest_weight);
  const shown = h("output", { class: "numeric" }, decimal(one.weight));
  const bar = slider(`Weight of ${id}`, one.weight, { min: -most / 2, max: most, step: 0.05 }, (weight) => {
    one.weight = weight;
    shown.textContent = decimal(weight);
    changed();
  });
  return h(
    "li",
    { class: "mix-row" },
    portrait(adapter ?? { id, tenant: "?", version: "" }),
    h("div", { class: "mix-name" }, h("b", {}, id), version && h("span", { class: "tag" }, short(version))),
    shown,
    bar,
    h(
      "button",
      { class: "button quiet icon small", type: "button", "aria-label": `Remove ${id}`, onclick: remove },
      icon(ICONS.close, 15),
    ),
  );
}
