/** The steps of a job that are kept, with their scores: which was chosen and why, which is served. */

import { listCheckpoints, serveCheckpoint } from "../api/training.js";
import { h } from "../frame/dom.js";
import { decimal } from "../frame/format.js";
import { notify, tell } from "../frame/notice.js";
import { link } from "../frame/router.js";

/** The table; null where nothing is kept. `refresh` is called when another has become current. */
export async function checkpointTable(entry, signal, refresh) {
  const found = await listCheckpoints(entry.run, { signal });
  if (!found.length) return null;
  const names = ["likeness", "fidelity", "balance", "copying"].filter((name) =>
    found.some((one) => name in one.metrics),
  );
  const serve = async (one) => {
    try {
      await serveCheckpoint(entry.run, one.id);
      notify(`Step ${one.step_number} is served now.`);
      await refresh();
    } catch (error) {
      tell(error);
    }
  };
  const line = (one) =>
    h(
      "tr",
      { class: one.chosen ? "is-chosen" : null },
      h("th", { scope: "row" }, `step ${one.step_number}`),
      names.map((name) => h("td", { class: "number" }, name in one.metrics ? decimal(one.metrics[name], 3) : "")),
      h(
        "td",
        { class: "small" },
        one.current && h("span", { class: "tag good" }, "served"),
        one.chosen && h("span", { class: "tag accent" }, "chosen"),
        one.reason && h("p", { class: "muted" }, one.reason),
      ),
      h(
        "td",
        {},
        entry.status === "succeeded" &&
          !one.current &&
          h("button", { class: "button small", type: "button", onclick: () => serve(one) }, "Make current"),
      ),
    );
  const compared = found.filter((one) => one.version).map((one) => `${entry.adapter}@${one.version}`);
  return [
    h("h2", {}, "Checkpoints"),
    h(
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
            h("th", { scope: "col" }, "Step"),
            names.map((name) => h("th", { scope: "col", class: "number" }, name)),
            h("th", { scope: "col" }, "Choice"),
            h("td", {}),
          ),
        ),
        h("tbody", {}, found.map(line)),
      ),
    ),
    compared.length > 1 &&
      h(
        "a",
        { class: "button small", href: link(["compare"], { adapters: compared.join(",") }) },
        "Compare those that are published",
      ),
  ];
}
