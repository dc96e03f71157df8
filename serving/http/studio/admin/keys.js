/** Keys and tenants: for admins. */

import { call, path, send } from "../api/http.js";
import { listKeys, listTenants } from "../api/training.js";
import { h, icon, ICONS, put } from "../frame/dom.js";
import { confirmed, openDialog } from "../frame/dialog.js";
import { choice, field, number } from "../frame/fields.js";
import { span, when } from "../frame/format.js";
import { notify, problemBox, tell } from "../frame/notice.js";

const SCOPES = [
  ["images", "draw pictures"],
  ["train", "train, upload and change adapters"],
  ["admin", "everything, also keys and quotas"],
];

/** The page. */
export async function keysPage({ signal }) {
  const keys = h("div");
  const tenants = h("div");
  async function load() {
    const [foundKeys, foundTenants] = await Promise.all([listKeys({ signal }), listTenants({ signal })]);
    put(keys, keyTable(foundKeys, load));
    put(tenants, tenantTable(foundTenants, load));
  }
  await load();
  return h(
    "div",
    {},
    h(
      "div",
      { class: "page-head" },
      h("div", {}, h("h1", { tabindex: "-1" }, "Keys"), h("p", {}, "Who may use this server, and how much.")),
      h(
        "div",
        { class: "page-head-actions" },
        h(
          "button",
          { class: "button main-action", type: "button", onclick: () => makeKey(load) },
          icon(ICONS.plus, 16),
          "New key",
        ),
      ),
    ),
    h(
      "div",
      { class: "stack" },
      h("section", { class: "panel" }, h("h2", {}, "Keys"), keys),
      h("section", { class: "panel" }, h("h2", {}, "Tenants"), tenants),
    ),
  );
}

function keyTable(keys, load) {
  const tone = { active: "good", expired: "warn", revoked: "" };
  const revoke = async (key) => {
    if (
      !(await confirmed(
        `Revoke the key ${key.id}?`,
        `Whoever uses it as ${key.tenant} is refused from now on.`,
        "Revoke it",
      ))
    )
      return;
    try {
      await send("DELETE", path("v1", "keys", key.id));
      await load();
    } catch (error) {
      tell(error);
    }
  };
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          ["Key", "Tenant", "May", "State", "Made", ""].map((text) => h("th", { scope: "col" }, text)),
        ),
      ),
      h(
        "tbody",
        {},
        keys.map((key) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, h("code", {}, key.id)),
            h("td", {}, key.tenant),
            h(
              "td",
              {},
              h(
                "div",
                { class: "tags" },
                key.scopes.map((scope) => h("span", { class: "tag" }, scope)),
              ),
            ),
            h(
              "td",
              {},
              h("span", { class: `tag ${tone[key.state]}` }, key.state),
              key.expires && h("span", { class: "muted small" }, ` ${when(Date.parse(key.expires) / 1000)}`),
            ),
            h("td", { class: "muted" }, when(Date.parse(key.created) / 1000)),
            h(
              "td",
              {},
              key.state === "active" &&
                h(
                  "button",
                  { class: "button quiet danger small", type: "button", onclick: () => revoke(key) },
                  "Revoke",
                ),
            ),
          ),
        ),
      ),
    ),
  );
}

function makeKey(load) {
  return openDialog("New key", (close, dialog) => {
    const tenant = h("input", { required: true, maxlength: 63, placeholder: "ann", spellcheck: "false" });
    const scopes = SCOPES.map(([scope, says]) => [
      scope,
      h("input", { type: "checkbox", checked: scope !== "admin" }),
      says,
    ]);
    const days = choice(
      [
        ["", "never"],
        ["30", "in 30 days"],
        ["90", "in 90 days"],
        ["365", "in a year"],
      ],
      "",
    );
    const problems = h("div");
    const submit = async (event) => {
      event.preventDefault();
      const body = { tenant: tenant.value, scopes: scopes.filter(([, box]) => box.checked).map(([scope]) => scope) };
      if (days.value) body.expires_at = Math.floor(Date.now() / 1000) + Number(days.value) * 86400;
      try {
        const made = await call("POST", "/v1/keys", body);
        await load();
        put(dialog.querySelector(".dialog-body"), shownOnce(made, close));
      } catch (error) {
        put(problems, problemBox(error));
      }
    };
    return h(
      "form",
      { class: "stack", onsubmit: submit },
      field("Tenant", tenant, "Whose adapters and runs it opens."),
      h(
        "fieldset",
        { class: "stack" },
        h("legend", { class: "label" }, "May"),
        scopes.map(([scope, box, says]) =>
          h("label", { class: "check" }, box, h("b", {}, scope), h("span", { class: "muted" }, says)),
        ),
      ),
      field("Expires", days),
      problems,
      h("div", { class: "dialog-end" }, h("button", { class: "button main-action" }, "Make the key")),
    );
  });
}

function shownOnce(made, close) {
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(made.key);
      notify("Copied.");
    } catch {
      notify("The browser does not allow copying here: select the key and copy it.", { bad: true });
    }
  };
  return [
    h("p", {}, `The key of ${made.tenant}. It is shown this once; the server keeps only its hash.`),
    h("code", { class: "shown-key" }, made.key),
    h(
      "div",
      { class: "dialog-end" },
      h("button", { class: "button", type: "button", onclick: copy }, "Copy"),
      h("button", { class: "button main-action", type: "button", onclick: () => close() }, "Done"),
    ),
  ];
}

function tenantTable(tenants, load) {
  const shown = (value) => (value === null || value === undefined ? "no limit" : String(value));
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          ["Tenant", "Waiting", "Device time this month", "Devices", "May wait", "Device-seconds a month", ""].map(
            (text) => h("th", { scope: "col" }, text),
          ),
        ),
      ),
      h(
        "tbody",
        {},
        tenants.map((one) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, one.id),
            h("td", {}, String(one.waiting)),
            h("td", {}, span(one.device_seconds)),
            ["devices", "waiting", "device_seconds"].map((name) => h("td", {}, shown(one.quota[name]))),
            h(
              "td",
              {},
              h(
                "button",
                {
                  class: "button small",
                  type: "button",
                  "aria-label": `Quota of ${one.id}`,
                  onclick: () => setQuota(one, load),
                },
                "Quota",
              ),
            ),
          ),
        ),
      ),
    ),
  );
}

function setQuota(tenant, load) {
  return openDialog(`Quota of ${tenant.id}`, (close) => {
    const quota = { ...tenant.quota };
    const problems = h("div");
    const input = (name) => number(quota[name], { min: 1, placeholder: "no limit" }, (value) => (quota[name] = value));
    const submit = async (event) => {
      event.preventDefault();
      try {
        await call("PUT", path("v1", "tenants", tenant.id, "quota"), quota);
        await load();
        close();
      } catch (error) {
        put(problems, problemBox(error));
      }
    };
    return h(
      "form",
      { class: "stack", onsubmit: submit },
      field("Devices at once", input("devices")),
      field("Subjects waiting or in training", input("waiting")),
      field("Device-seconds a month", input("device_seconds")),
      problems,
      h("div", { class: "dialog-end" }, h("button", { class: "button main-action" }, "Save")),
    );
  });
}
