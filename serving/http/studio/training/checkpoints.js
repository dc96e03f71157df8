/** The steps of a subject, with their scores: which was chosen and why, which is served; any that is kept can be drawn. */

import { listCheckpoints, publishCheckpoint, serveCheckpoint } from "../api/training.js";
import { h } from "../frame/dom.js";
import { decimal } from "../frame/format.js";
import { notify, tell } from "../frame/notice.js";
import { go, link } from "../frame/router.js";

const NAMES = ["likeness", "fidelity", "balance", "copying"];

/** The table; null where nothing is kept. `refresh` is called when another has become current. */
export async function checkpointTable(entry, signal, refresh) {
  const found = await listCheckpoints(entry.base, { signal });
  if (!found.length) return null;
  const names = NAMES.filter((name) => found.some((one) => name in one.metrics));
  const done = entry.status === "succeeded";
  const chosen = new Set();
  const compare = h(
    "button",
    { class: "button small", type: "button", disabled: true, onclick: () => drawWith([...chosen]) },
    "Compare the chosen steps",
  );

  const serve = async (one) => {
    try {
      await serveCheckpoint(entry.base, one.id);
      notify(`Step ${one.step_number} is served now.`);
      await refresh();
    } catch (error) {
      tell(error);
    }
  };

  /** Sees to it that each is a version, and opens a sheet of them, or the one in Create. */
  const drawWith = async (some) => {
    compare.disabled = true;
    try {
      const named = [];
      for (const one of some.sort((a, b) => a.step_number - b.step_number)) {
        const { version } = one.version ? one : await publishCheckpoint(entry.base, one.id);
        named.push(`${entry.adapter}@${version}`);
      }
      go(
        named.length > 1
          ? link(["compare"], { adapters: named.join(",") })
          : link(["create"], { adapter: named[0] }),
      );
    } catch (error) {
      tell(error);
      compare.disabled = chosen.size < 2;
    }
  };

  const choose = (one) =>
    h("input", {
      type: "checkbox",
      "aria-label": `Compare step ${one.step_number}`,
      onchange: (event) => {
        if (event.target.checked) chosen.add(one);
        else chosen.delete(one);
        compare.disabled = chosen.size < 2;
      },
    });

  const line = (one) => {
    const drawn = done && (one.kept || one.version);
    return h(
      "tr",
      { class: one.chosen ? "is-chosen" : null },
      h("td", {}, drawn && choose(one)),
      h("th", { scope: "row" }, `step ${one.step_number}`),
      names.map((name) => h("td", { class: "number" }, name in one.metrics ? decimal(one.metrics[name], 3) : "")),
      h(
        "td",
        { class: "small" },
        one.current && h("span", { class: "tag good" }, "served"),
        one.chosen && h("span", { class: "tag accent" }, "chosen"),
        one.reason && h("p", { class: "muted" }, one.reason),
        !one.kept && !one.version && h("p", { class: "muted" }, "Its weights are not kept: it cannot be drawn."),
      ),
      h(
        "td",
        {},
        h(
          "div",
          { class: "row" },
          drawn &&
            h("button", { class: "button quiet small", type: "button", onclick: () => drawWith([one]) }, "Draw"),
          drawn &&
            !one.current &&
            h("button", { class: "button small", type: "button", onclick: () => serve(one) }, "Make current"),
        ),
      ),
    );
  };
  const head = h(
    "tr",
    {},
    h("td", {}),
    h("th", { scope: "col" }, "Step"),
    names.map((name) => h("th", { scope: "col", class: "number" }, name)),
    h("th", { scope: "col" }, "Choice"),
    h("td", {}),
  );
  return [
    h("h2", {}, "Checkpoints"),
    h("div", { class: "scroll" }, h("table", {}, h("thead", {}, head), h("tbody", {}, found.map(line)))),
    done && found.filter((one) => one.kept || one.version).length > 1 && compare,
  ];
}
