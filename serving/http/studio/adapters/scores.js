/** The scores on an adapter's card: how they went over the steps, which step was chosen, and why. */

import { chart } from "../charts/chart.js";
import { h } from "../frame/dom.js";
import { decimal } from "../frame/format.js";

// what is drawn first, and what each score says; `better` as in the evaluation's own table
const SCORES = {
  balance: { better: "high", says: "what the choice maximises: likeness and fidelity together" },
  likeness: { better: "high", says: "how much the pictures are like photos that were held out" },
  fidelity: { better: "high", says: "how well the pictures follow the prompt" },
  diversity: { better: "high", says: "how much pictures of one prompt differ" },
  identity: { better: "high", says: "whether faces are the same person's" },
  copying: { better: "low", says: "how near the pictures come to copies of a photo" },
  class_drift: { better: "low", says: "how much the plain class has come to look like the subject" },
  pres: { better: "low", says: "how much pictures of the plain class are like the photos" },
  language_drift: { better: "low", says: "how much unrelated pictures change" },
  likeness_training: { better: null, says: "how much the pictures are like the photos that were trained on" },
  sharpness: { better: null, says: "detail in the pictures" },
  saturation: { better: null, says: "colour in the pictures" },
};
const DRAWN = ["balance", "likeness", "fidelity", "copying", "diversity", "class_drift"];

/** The panel of a card's scores; says so where there are none. */
export function scoresPanel(card) {
  const steps = [
    ...new Set((card.scores ?? []).map((one) => one.step).filter((step) => step !== null && step !== undefined)),
  ].sort((a, b) => a - b);
  const panel = h("section", { class: "panel", "aria-labelledby": "scores" }, h("h2", { id: "scores" }, "Scores"));
  if (!steps.length) {
    panel.append(
      h(
        "p",
        { class: "muted" },
        "This version has not been judged: it was uploaded, or trained with evaluation turned off.",
      ),
    );
    return panel;
  }
  const byName = new Map();
  for (const { name, step, value } of card.scores) {
    if (steps.includes(step)) byName.set(name, new Map([...(byName.get(name) ?? []), [step, value]]));
  }
  if (card.chosen) {
    panel.append(
      h("p", { class: "chosen" }, h("b", {}, `Step ${card.chosen.step} was chosen: `), card.chosen.reason, "."),
    );
  }
  panel.append(curves(byName, card.chosen?.step), table(byName, steps, card.chosen?.step));
  return panel;
}

function curves(byName, chosen) {
  const series = DRAWN.filter((name) => byName.has(name)).map((name, at) => ({
    name: plain(name),
    color: `var(--curve-${at + 1})`,
    points: [...byName.get(name)].sort(([a], [b]) => a - b),
    dashed: at > 2,
  }));
  return chart({
    series,
    x: "step",
    low: 0,
    high: 1,
    marks: chosen === undefined ? [] : [{ x: chosen, text: "chosen" }],
    height: 260,
  });
}

function table(byName, steps, chosen) {
  const known = Object.keys(SCORES).filter((name) => byName.has(name));
  const names = [...known, ...[...byName.keys()].filter((name) => !(name in SCORES))];
  const cell = (name, step) => {
    const value = byName.get(name).get(step);
    return h(
      "td",
      { class: `number ${step === chosen ? "is-chosen" : ""}` },
      value === undefined ? "" : decimal(value, 3),
    );
  };
  const arrow = { high: "higher is better", low: "lower is better" };
  return h(
    "details",
    { class: "more" },
    h("summary", {}, "All scores"),
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
            h("th", { scope: "col" }, "Score"),
            steps.map((step) => h("th", { scope: "col", class: "number" }, `step ${step}`)),
          ),
        ),
        h(
          "tbody",
          {},
          names.map((name) =>
            h(
              "tr",
              {},
              h(
                "th",
                { scope: "row" },
                h("span", { class: "score-name" }, plain(name)),
                h(
                  "span",
                  { class: "muted score-says" },
                  [SCORES[name]?.says, arrow[SCORES[name]?.better]].filter(Boolean).join("; "),
                ),
              ),
              steps.map((step) => cell(name, step)),
            ),
          ),
        ),
      ),
    ),
  );
}

function plain(name) {
  return name.replaceAll("_", " ");
}
