/** The dialog about the server: what it serves, who one is, the theme. */

import { h } from "./dom.js";
import { openDialog } from "./dialog.js";
import { segments } from "./fields.js";
import { heldKey, holdKey } from "./key.js";
import { server } from "../api/server.js";

/** Opens it. `tabs` that the tab bar of a phone has no room for are links here. */
export function aboutServer(tabs) {
  return openDialog("This server", (close) => {
    const facts = h("dl", { class: "facts" }, h("dt", {}, "Address"), h("dd", {}, location.host));
    server().then(
      (found) => {
        facts.append(h("dt", {}, "Base"), h("dd", {}, found.base));
        facts.append(
          h("dt", {}, "Pictures"),
          h("dd", {}, `${found.defaults.size}, ${found.defaults.steps} steps, ${found.defaults.scheduler}`),
        );
        if (found.caller) facts.append(h("dt", {}, "Tenant"), h("dd", {}, found.caller.tenant));
      },
      () => facts.append(h("dt", {}, "Base"), h("dd", {}, "not known yet")),
    );
    const forget = () => {
      holdKey("");
      close();
      location.reload();
    };
    const rare = tabs.filter((tab) => tab.rare);
    return [
      facts,
      h(
        "div",
        { class: "spread" },
        h("span", { class: "label" }, "Theme"),
        segments(
          "Theme",
          [
            ["auto", "Auto"],
            ["light", "Light"],
            ["dark", "Dark"],
          ],
          window.theme.get(),
          (theme) => window.theme.set(theme),
        ),
      ),
      h(
        "div",
        { class: "spread" },
        h(
          "span",
          { class: "row" },
          h("a", { href: "/docs" }, "API reference"),
          rare.map((tab) => h("a", { href: `#/${tab.path}` }, tab.text)),
        ),
        heldKey() && h("button", { class: "button small", type: "button", onclick: forget }, "Forget the key"),
      ),
    ];
  });
}
