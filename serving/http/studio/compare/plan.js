/** What a sheet compares: columns that wear something, rows that say something; each cell is one request. */

import { decimal, short } from "../frame/format.js";
import { SETTINGS, nameOf } from "../pictures/recipe.js";

const PLACE = "dreamfleet.compare";
export const MOST_CELLS = 400;

/** A plan as the form edits it. `kind`: adapters or strength; `adapters` are {id, weight}. */
export function emptyPlan() {
  return {
    kind: "adapters",
    adapters: [],
    base: true,
    from: 0,
    to: 1.5,
    columns: 6,
    prompts: "",
    seeds: "1, 2",
    size: null,
    steps: null,
    guidance_scale: null,
    scheduler: null,
    negative_prompt: "",
  };
}

/** The plan as it was left. */
export function savedPlan() {
  try {
    const saved = JSON.parse(sessionStorage.getItem(PLACE) ?? "{}");
    return { ...emptyPlan(), ...(Array.isArray(saved.adapters) ? saved : {}) };
  } catch {
    return emptyPlan();
  }
}

/** Keeps it while the tab is open. */
export function savePlan(plan) {
  try {
    sessionStorage.setItem(PLACE, JSON.stringify(plan));
  } catch {
    // then it is gone with the page
  }
}

/** The columns: {title, note, adapters}. */
export function columnsOf(plan) {
  if (plan.kind === "strength") {
    const [worn] = plan.adapters;
    if (!worn) return [];
    const many = Math.max(2, plan.columns);
    return Array.from({ length: many }, (_, at) => {
      const weight = Number((plan.from + ((plan.to - plan.from) * at) / (many - 1)).toFixed(3));
      return { title: decimal(weight), note: nameOf(worn.id), adapters: [{ id: worn.id, weight }] };
    });
  }
  const worn = plan.adapters.map(({ id, weight }) => ({
    title: nameOf(id),
    note: [id.includes("@") ? short(id.split("@")[1]) : null, weight === 1 ? null : decimal(weight)]
      .filter(Boolean)
      .join(" · "),
    adapters: [{ id, weight }],
  }));
  return plan.base ? [{ title: "base", note: "no adapter", adapters: [] }, ...worn] : worn;
}

/** The rows: {prompt, seed}. */
export function rowsOf(plan) {
  const prompts = plan.prompts
    .split("\n")
    .map((line) => line.trim())
    .filter(Boolean);
  const seeds = seedsOf(plan.seeds);
  return prompts.flatMap((prompt) => seeds.map((seed) => ({ prompt, seed })));
}

/** The seeds in a text such as "1, 2, 5-8"; one if it names none. */
export function seedsOf(text) {
  const found = text
    .split(/[,\s]+/)
    .filter(Boolean)
    .flatMap((part) => {
      const [, from, to] = /^(\d+)(?:-(\d+))?$/.exec(part) ?? [];
      if (from === undefined) return [];
      const last = to === undefined ? Number(from) : Math.min(Number(to), Number(from) + 63);
      return Array.from({ length: Math.max(0, last - Number(from) + 1) }, (_, at) => Number(from) + at);
    });
  return found.length ? [...new Set(found)] : [1];
}

/** The request of one cell. */
export function cellBody(plan, column, row) {
  const body = { prompt: row.prompt, seed: row.seed, n: 1 };
  if (column.adapters.length) body.adapters = column.adapters;
  for (const name of SETTINGS) if (plan[name]) body[name] = plan[name];
  return body;
}
