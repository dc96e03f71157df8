/** The versions of an own adapter: which is served, and what can be done with the others. */

import { changeAdapter, deleteVersion, listVersions } from "../api/adapters.js";
import { h, icon, ICONS, put } from "../frame/dom.js";
import { confirmed } from "../frame/dialog.js";
import { bytes, count, short, when } from "../frame/format.js";
import { notify, tell } from "../frame/notice.js";
import { link } from "../frame/router.js";

/** The panel. `shown` is the version on the page; `changed` is called when another has become current. */
export async function versionsPanel(adapter, shown, changed) {
  const list = h("ul", { class: "versions" });
  const panel = h(
    "section",
    { class: "panel", "aria-labelledby": "versions" },
    h("h2", { id: "versions" }, "Versions"),
    list,
  );

  async function show() {
    const versions = await listVersions(adapter.id);
    put(
      list,
      versions.map((one) => row(one)),
    );
    if (versions.length > 1) {
      const names = versions.slice(0, 6).map((one) => `${adapter.tenant}/${adapter.id}@${one.version}`);
      put(
        list,
        versions.map((one) => row(one)),
        h(
          "li",
          {},
          h(
            "a",
            { class: "button small", href: link(["compare"], { adapters: names.join(",") }) },
            "Compare the versions",
          ),
        ),
      );
    }
  }

  async function serve(version) {
    try {
      await changeAdapter(adapter.id, { version });
      notify(`Version ${short(version)} is served now.`);
      changed();
    } catch (error) {
      tell(error);
    }
  }

  async function remove(version) {
    if (
      !(await confirmed(
        `Delete version ${short(version)}?`,
        "Its weights and samples are deleted for good. Other versions stay.",
        "Delete it",
      ))
    )
      return;
    try {
      await deleteVersion(adapter.id, version);
      await show();
    } catch (error) {
      tell(error);
    }
  }

  function row(one) {
    const here = one.version === shown;
    return h(
      "li",
      { class: here ? "here" : null },
      h(
        "div",
        {},
        h(
          "a",
          {
            href: link(["adapters", adapter.tenant, adapter.id], { version: one.version }),
            "aria-current": here ? "true" : null,
          },
          h("code", {}, short(one.version)),
        ),
        one.current && h("span", { class: "tag good" }, "served"),
        h(
          "div",
          { class: "muted small" },
          [when(one.created), one.steps ? count(one.steps, "step") : null, bytes(one.bytes)]
            .filter(Boolean)
            .join(" · "),
        ),
      ),
      !one.current &&
        h(
          "div",
          { class: "row" },
          h("button", { class: "button small", type: "button", onclick: () => serve(one.version) }, "Make current"),
          h(
            "button",
            {
              class: "button quiet icon small",
              type: "button",
              "aria-label": `Delete version ${short(one.version)}`,
              onclick: () => remove(one.version),
            },
            icon(ICONS.trash, 16),
          ),
        ),
    );
  }

  await show();
  return panel;
}
