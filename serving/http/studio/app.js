/** The studio: routes, and what is around every page. A page is a function of {parts, query, signal}. */

import { adaptersPage } from "./adapters/gallery.js";
import { adapterPage } from "./adapters/page.js";
import { forgetServer } from "./api/server.js";
import { Problem } from "./api/http.js";
import { comparePage } from "./compare/page.js";
import { createPage } from "./create/page.js";
import { h, put } from "./frame/dom.js";
import { header } from "./frame/header.js";
import { keyPage } from "./frame/key.js";
import { problemBox } from "./frame/notice.js";
import { address, follow, go } from "./frame/router.js";

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
];

let leaving = new AbortController();
let chrome = null;
const main = h("main", { class: "main", id: "main", tabindex: "-1" });

async function start() {
  document.body.append(h("a", { class: "skip", href: "#main", onclick: skip }, "Skip to the page"), main);
  document.addEventListener("key-needed", (event) => askKey(event.detail));
  frame(TABS);
  follow(show);
}

function frame(tabs) {
  chrome?.bar.remove();
  chrome = header(tabs);
  main.before(chrome.bar);
}

async function show() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const { parts, query } = address();
  const tab = TABS.find((one) => one.path === parts[0]);
  if (!tab) return go("#/create", { replace: true });
  chrome.mark(tab.path);
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
