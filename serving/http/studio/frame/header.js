/** What is above every page: the name, the pages, the server's state and light or dark. */

import { h, icon, ICONS } from "./dom.js";
import { aboutServer } from "./about.js";

const SUN =
  "M12 7.500a4.500 4.500 0 1 0 0 9a4.500 4.500 0 0 0 0-9zM12 2.500v2M12 19.500v2M2.500 12h2M19.500 12h2M5.300 5.300l1.400 1.400M17.300 17.300l1.400 1.400M5.300 18.700l1.400-1.400M17.300 6.700l1.400-1.400";
const MOON = "M19.500 14.500A8 8 0 0 1 9.500 4.500a8 8 0 1 0 10 10z";

/** The header, with a function that marks the page that is shown. `tabs`: {path, text, icon, rare}. */
export function header(tabs) {
  const links = tabs.map((tab) =>
    h(
      "a",
      { href: `#/${tab.path}`, class: tab.rare ? "rare" : null, data: { path: tab.path } },
      icon(tab.icon, 21),
      h("span", {}, tab.text),
    ),
  );
  const bar = h(
    "header",
    { class: "header" },
    h("a", { class: "wordmark", href: "#/" }, h("img", { src: "/studio/icon.svg", alt: "" }), "dreamfleet"),
    h("nav", { class: "tabs", "aria-label": "Pages" }, links),
    h(
      "div",
      { class: "header-end" },
      themeButton(),
      h(
        "button",
        {
          class: "button quiet icon",
          type: "button",
          "aria-label": "Server and key",
          title: "Server and key",
          onclick: () => aboutServer(tabs),
        },
        icon(ICONS.key),
      ),
    ),
  );
  const mark = (path) => {
    for (const one of links) {
      if (one.dataset.path === path) one.setAttribute("aria-current", "page");
      else one.removeAttribute("aria-current");
    }
  };
  return { bar, mark };
}

function themeButton() {
  const isDark = () => {
    const chosen = window.theme.get();
    return chosen === "auto" ? matchMedia("(prefers-color-scheme: dark)").matches : chosen === "dark";
  };
  const show = () => {
    const text = isDark() ? "Use the light theme" : "Use the dark theme";
    button.replaceChildren(icon(isDark() ? SUN : MOON));
    button.setAttribute("aria-label", text);
    button.title = text;
  };
  const button = h("button", {
    class: "button quiet icon",
    type: "button",
    onclick: () => window.theme.set(isDark() ? "light" : "dark"),
  });
  show();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  addEventListener("theme", show);
  return button;
}
