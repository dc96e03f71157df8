/** Usage: what the tenant has used, by day and by adapter. */

import { showUsage } from "../api/training.js";
import { h, put } from "../frame/dom.js";
import { segments } from "../frame/fields.js";
import { bytes, span, whole } from "../frame/format.js";
import { tell } from "../frame/notice.js";

const KINDS = [
  ["images", "Pictures", whole],
  ["pixel_steps", "Pixel-steps", compact],
  ["training_steps", "Training steps", whole],
  ["device_seconds", "Device time", span],
];

/** The page. */
export async function usagePage({ signal }) {
  const body = h("div", { class: "stack" });
  let days = 30;
  const load = async () => {
    const since = new Date(Date.now() - (days - 1) * 86400e3).toISOString().slice(0, 10);
    const usage = await showUsage(since, { signal });
    put(
      body,
      totals(usage),
      usage.data.length
        ? tables(usage)
        : h(
            "div",
            { class: "empty" },
            h("h2", {}, "Nothing used yet"),
            h("p", {}, "Draw a picture or train a subject; what it took is counted here."),
          ),
    );
  };
  await load();
  return h(
    "div",
    {},
    h(
      "div",
      { class: "page-head" },
      h("div", {}, h("h1", { tabindex: "-1" }, "Usage"), h("p", {}, "What your tenant has used.")),
      segments(
        "Days",
        [
          [7, "7 days"],
          [30, "30 days"],
          [365, "A year"],
        ],
        days,
        (value) => {
          days = value;
          load().catch(tell);
        },
      ),
    ),
    body,
  );
}

function totals(usage) {
  const shown = [
    ...KINDS.map(([key, text, format]) => [text, format(usage.total[key])]),
    ["Adapters kept", bytes(usage.stored_bytes.adapters ?? 0)],
    ["Photos kept", bytes(usage.stored_bytes.files ?? 0)],
  ];
  return h(
    "dl",
    { class: "totals" },
    shown.map(([name, value]) =>
      h("div", { class: "panel" }, h("dt", { class: "muted small" }, name), h("dd", { class: "numeric" }, value)),
    ),
  );
}

function tables(usage) {
  return [
    h("section", { class: "panel" }, h("h2", {}, "By day"), table("Day", grouped(usage.data, "day").reverse())),
    h("section", { class: "panel" }, h("h2", {}, "By adapter"), table("Adapter", grouped(usage.data, "adapter"))),
  ];
}

function grouped(lines, by) {
  const sums = new Map();
  for (const line of lines) {
    const sum = sums.get(line[by]) ?? Object.fromEntries(KINDS.map(([key]) => [key, 0]));
    for (const [key] of KINDS) sum[key] += line[key];
    sums.set(line[by], sum);
  }
  return [...sums.entries()].sort(([a], [b]) => (a < b ? -1 : 1));
}

function table(name, rows) {
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
          h("th", { scope: "col" }, name),
          KINDS.map(([, text]) => h("th", { scope: "col", class: "number" }, text)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map(([key, sum]) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, key || "the base alone"),
            KINDS.map(([kind, , format]) => h("td", { class: "number" }, sum[kind] ? format(sum[kind]) : "")),
          ),
        ),
      ),
    ),
  );
}

function compact(number) {
  return new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(number);
}
