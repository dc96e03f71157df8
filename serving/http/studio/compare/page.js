/** Compare: adapters side by side on the same prompts and seeds, or one adapter at growing strength. */

import { showAdapter } from "../api/adapters.js";
import { server } from "../api/server.js";
import { mixField } from "../create/mix.js";
import { settingsFields } from "../create/settings.js";
import { h, put } from "../frame/dom.js";
import { field, number, segments, textarea } from "../frame/fields.js";
import { count } from "../frame/format.js";
import { problemBox, tell } from "../frame/notice.js";
import { link, settle } from "../frame/router.js";
import { columnsOf, MOST_CELLS, rowsOf, savedPlan, savePlan } from "./plan.js";
import { sheet } from "./sheet.js";

const HINT = {
  adapters: "The same prompts and seeds, drawn with each adapter. What differs is the adapter.",
  strength: "One adapter from weak to strong: find the weight that keeps the subject and still follows the prompt.",
};

/** The page. `?adapters=a,b` or `?sweep=a` sets what is compared. */
export async function comparePage({ query, signal }) {
  const { base, defaults } = await server();
  const plan = savedPlan();
  if (query.has("adapters") || query.has("sweep")) await take(plan, query);
  const result = h("div", {});
  const form = h("form", { class: "panel compare-form", "aria-label": "What to compare" });
  const sum = h("span", { class: "muted small" });
  const problems = h("div");
  const changed = () => {
    savePlan(plan);
    sum.textContent = count(columnsOf(plan).length * rowsOf(plan).length, "picture");
  };

  function show() {
    put(
      form,
      segments(
        "What differs",
        [
          ["adapters", "Adapters"],
          ["strength", "Strength"],
        ],
        plan.kind,
        (kind) => {
          plan.kind = kind;
          changed();
          show();
        },
      ),
      h("p", { class: "muted small" }, HINT[plan.kind]),
      mixField(
        limited(plan),
        plan.kind === "strength" ? { ...defaults, largest_adapters: 1 } : { ...defaults, largest_adapters: 12 },
        changed,
        { added: offer, twice: true },
      ),
      plan.kind === "adapters" ? baseField(plan, changed) : strengthFields(plan, defaults, changed),
      field("Prompts, one a line", prompts()),
      field(
        "Seeds",
        h("input", {
          value: plan.seeds,
          placeholder: "1, 2, 5-8",
          oninput: (event) => set("seeds", event.target.value),
        }),
      ),
      h(
        "details",
        { class: "more" },
        h("summary", {}, "Size, sampler"),
        h("div", {}, settingsFields(plan, defaults, changed)),
      ),
      problems,
      h("div", { class: "composer-end" }, h("button", { class: "button main-action" }, "Draw the sheet"), sum),
    );
    changed();
  }
  const set = (name, value) => {
    plan[name] = value;
    changed();
  };
  const prompts = () =>
    textarea(
      { rows: 3, value: plan.prompts, placeholder: "a photo of a sks dog in the snow\na photo of a sks dog at night" },
      (text) => set("prompts", text),
    );
  const offer = (adapter) => {
    if (plan.prompts || !adapter.trigger) return;
    plan.prompts = suggestion(adapter.trigger);
    show();
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const [columns, rows] = [columnsOf(plan), rowsOf(plan)];
    const wrong = complaint(columns, rows);
    put(problems, wrong && problemBox(wrong));
    if (!wrong) put(result, sheet({ base, defaults, signal }, { ...plan }, columns, rows));
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  show();
  put(
    result,
    h(
      "div",
      { class: "empty" },
      h("h2", {}, "Nothing compared yet"),
      h(
        "p",
        {},
        "Choose adapters or versions, write a prompt, and draw the sheet. Each picture is made with the seed of its row, so rows can be compared.",
      ),
    ),
  );
  if (query.size) settle(link(["compare"]));
  return h(
    "div",
    {},
    h(
      "div",
      { class: "page-head" },
      h(
        "div",
        {},
        h("h1", { tabindex: "-1" }, "Compare"),
        h("p", {}, "Adapters, versions and strengths side by side."),
      ),
    ),
    h("div", { class: "compare" }, form, result),
  );
}

function limited(plan) {
  if (plan.kind === "strength") plan.adapters.splice(1);
  return plan;
}

function baseField(plan, changed) {
  const box = h("input", {
    type: "checkbox",
    checked: plan.base,
    onchange: () => {
      plan.base = box.checked;
      changed();
    },
  });
  return h("label", { class: "check" }, box, "Also the base without an adapter");
}

function strengthFields(plan, defaults, changed) {
  const most = defaults.largest_weight;
  const set = (name) => (value) => {
    plan[name] = value ?? 0;
    changed();
  };
  return h(
    "div",
    { class: "fields" },
    field("From", number(plan.from, { min: -most, max: most, step: 0.1 }, set("from"))),
    field("To", number(plan.to, { min: -most, max: most, step: 0.1 }, set("to"))),
    field("Columns", number(plan.columns, { min: 2, max: 20 }, set("columns"))),
  );
}

async function take(plan, query) {
  plan.kind = query.has("sweep") ? "strength" : "adapters";
  const names = (query.get("sweep") ?? query.get("adapters")).split(",");
  plan.adapters = names.map((id) => ({ id, weight: 1 }));
  const adapter = await showAdapter(names[0]).catch(tell);
  if (adapter?.trigger && !plan.prompts.includes(adapter.trigger)) plan.prompts = suggestion(adapter.trigger);
}

function suggestion(trigger) {
  return ["in the snow", "at night"].map((place) => `a photo of a ${trigger} ${place}`).join("\n");
}

function complaint(columns, rows) {
  if (!columns.length) return "Choose at least one adapter.";
  if (!rows.length) return "Write at least one prompt.";
  const cells = columns.length * rows.length;
  return cells > MOST_CELLS
    ? `That is ${cells} pictures; a sheet has at most ${MOST_CELLS}. Take fewer prompts, seeds or columns.`
    : null;
}
