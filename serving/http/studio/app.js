/** The studio: routes, and what is around every page. A page is a function of {parts, query, signal}. */

import { keysPage } from "./admin/keys.js";
import { usagePage } from "./admin/usage.js";
import { adaptersPage } from "./adapters/gallery.js";
import { adapterPage } from "./adapters/page.js";
import { forgetServer, server } from "./api/server.js";
import { Problem } from "./api/http.js";
import { comparePage } from "./compare/page.js";
import { createPage } from "./create/page.js";
import { h, ICONS, put } from "./frame/dom.js";
import { header } from "./frame/header.js";
import { keyPage } from "./frame/key.js";
import { problemBox } from "./frame/notice.js";
import { address, follow, go } from "./frame/router.js";
import { subjectsPage } from "./subjects/page.js";
import { subjectPage } from "./training/detail.js";
import { trainingPage } from "./training/page.js";

const TABS = [
  {
    path: "create",
    text: "Create",
    page: createPage,
    icon: "M12 4l1.800 5.200L19 11l-5.200 1.800L12 18l-1.800-5.200L5 11l5.200-1.800zM19 16v4M17 18h4",
  },
  { path: "compare", text: "Compare", page: comparePage, icon: "M4 4h7v7H4zM13 4h7v7h-7zM4 13h7v7H4zM13 13h7v7h-7z" },
  {
    path: "adapters",
    text: "Adapters",
    page: adaptersPage,
    one: adapterPage,
    icon: "M12 4l8 4-8 4-8-4zM4 12l8 4 8-4M4 16l8 4 8-4",
  },
  {
    path: "subjects",
    text: "Subjects",
    page: subjectsPage,
    when: trains,
    icon: "M4 7h4l1.500-2h5L16 7h4v12H4zM12 9.500a3.500 3.500 0 1 0 0 7a3.500 3.500 0 0 0 0-7z",
  },
  {
    path: "training",
    text: "Training",
    page: trainingPage,
    one: subjectPage,
    when: trains,
    icon: "M4 19h16M4 15l5-5 4 3 7-8M20 5v4M20 5h-4",
  },
  { path: "usage", text: "Usage", page: usagePage, when: trains, rare: true, icon: "M5 19V11M12 19V5M19 19v-6" },
  { path: "keys", text: "Keys", page: keysPage, when: manages, rare: true, icon: ICONS.key },
];

let leaving = new AbortController();
let chrome = null;
const main = h("main", { class: "main", id: "main", tabindex: "-1" });

function trains(server) {
  return server.trains;
}

function manages({ caller }) {
  return Boolean(caller?.keys && caller.scopes.includes("admin"));
}

async function start() {
  document.body.append(h("a", { class: "skip", href: "#main", onclick: skip }, "Skip to the page"), main);
  document.addEventListener("key-needed", (event) => askKey(event.detail));
  frame(TABS.filter((tab) => !tab.when));
  follow(show);
}

/** The header with what this server has for this caller. */
function frame(tabs) {
  if (chrome?.tabs.length === tabs.length) return;
  chrome?.bar.remove();
  chrome = { tabs, ...header(tabs) };
  main.before(chrome.bar);
}

async function show() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const { parts, query } = address();
  const tab = TABS.find((one) => one.path === parts[0]);
  if (!tab) return go("#/create", { replace: true });
  document.title = `${tab.text} · dreamfleet`;
  const slow = setTimeout(
    () =>
      put(
        main,
        h("div", { class: "loading" }, h("span", { class: "spinner", role: "status", "aria-label": "Loading" })),
      ),
    150,
  );
  try {
    const found = await server();
    frame(TABS.filter((one) => !one.when || one.when(found)));
    if (signal.aborted) return;
    if (!chrome.tabs.includes(tab)) return go("#/create", { replace: true });
    chrome.mark(tab.path);
    const page = parts.length > 1 && tab.one ? tab.one : tab.page;
    const content = await page({ parts: parts.slice(1), query, signal });
    if (signal.aborted) return;
    put(main, content);
    scrollTo(0, 0);
    (main.querySelector("h1") ?? main).focus({ preventScroll: true });
  } catch (error) {
    if (signal.aborted || error.name === "AbortError" || (error instanceof Problem && error.status === 401)) return;
    put(main, failed(error));
  } finally {
    clearTimeout(slow);
  }
}

function failed(error) {
  return h(
    "div",
    { class: "stack" },
    problemBox(error),
    h("div", { class: "row" }, h("button", { class: "button", type: "button", onclick: show }, "Try again")),
  );
}

function askKey(message) {
  leaving.abort();
  forgetServer();
  put(
    main,
    keyPage(message, () => {
      forgetServer();
      show();
    }),
  );
}

function skip(event) {
  event.preventDefault();
  main.focus();
}

void start();
