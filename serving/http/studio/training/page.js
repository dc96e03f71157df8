/** Training: who trains with whom, who waits, how each subject stands. */

import { server } from "../api/server.js";
import { showFleet } from "../api/training.js";
import { h, icon, ICONS, put } from "../frame/dom.js";
import { count, decimal, when } from "../frame/format.js";
import { poll } from "../frame/poll.js";
import { problemBox } from "../frame/notice.js";
import { demoButton } from "../subjects/demo.js";
import { controls } from "./controls.js";
import { listEntries } from "./entries.js";
import { face } from "./samples.js";
import { lineOf, share, tagOf } from "./words.js";

const POLL_MS = 2000;

/** The page; it is live. */
export async function trainingPage({ signal }) {
  const { base } = await server();
  const problems = h("div");
  const lanes = h("div", { class: "lanes" });
  const now = h("ul", { class: "entries" });
  const past = h("ul", { class: "entries" });
  const blank = h("div");
  const heads = { now: head("Now"), past: head("Before") };
  const rows = new Map();

  async function refresh() {
    const [entries, fleet] = await Promise.all([listEntries({ signal }), showFleet({ signal })]);
    put(
      problems,
      !fleet.driven &&
        problemBox(
          "No driver leads the fleet at the moment: subjects wait until one does. What is accepted is kept.",
          "warn",
        ),
    );
    put(
      lanes,
      fleet.lanes.filter((lane) => lane.subjects.length || lane.others).map((lane) => pack(lane, entries)),
      queue(fleet),
    );
    const running = entries.filter((one) => !one.ended);
    arrange(now, running.sort(byPlace));
    arrange(
      past,
      entries.filter((one) => one.ended),
    );
    heads.now.show(running, refresh);
    heads.past.show(
      entries.filter((one) => one.ended),
      refresh,
    );
    put(blank, !entries.length && nothing(base));
  }

  function arrange(list, entries) {
    const nodes = entries.map((entry) => {
      const key = `${entry.run}/${entry.id}`;
      if (!rows.has(key)) rows.set(key, row(entry, refresh));
      rows.get(key).show(entry);
      return rows.get(key).node;
    });
    if (nodes.some((node, at) => list.children[at] !== node) || nodes.length !== list.childElementCount)
      put(list, nodes);
  }

  await refresh();
  void poll(POLL_MS, signal, refresh, (error) => put(problems, problemBox(error)));
  return h(
    "div",
    {},
    h(
      "div",
      { class: "page-head" },
      h(
        "div",
        {},
        h("h1", { tabindex: "-1" }, "Training"),
        h("p", {}, "Subjects on the same lane train together, in one pass over the base."),
      ),
      h(
        "div",
        { class: "page-head-actions" },
        h("a", { class: "button main-action", href: "#/subjects" }, icon(ICONS.plus, 16), "New subject"),
      ),
    ),
    problems,
    lanes,
    blank,
    heads.now.node,
    now,
    heads.past.node,
    past,
  );
}

/** The heading of a list, with the buttons of the runs that are in it: a run is cancelled or tried again as a whole. */
function head(text) {
  const buttons = h("div", { class: "row" });
  const node = h("div", { class: "spread" }, h("h2", {}, text), buttons);
  let known = "";
  const show = (entries, refresh) => {
    node.hidden = !entries.length;
    const asked = new Map();
    for (const one of entries) {
      if (one.kind === "run" && one.status !== "succeeded") asked.set(`${one.run} ${one.ended}`, one);
    }
    if ([...asked.keys()].join() === known) return;
    known = [...asked.keys()].join();
    put(
      buttons,
      [...asked.values()].map((one) => controls(one, refresh)),
    );
  };
  return { node, show };
}

/** A lane: whose subjects share its passes. */
function pack(lane, entries) {
  const size = lane.subjects.length + lane.others;
  const chips = lane.subjects.map(({ run, id, doing }) => {
    const entry = entries.find((one) => one.run === run && one.id === id);
    return h("a", { class: "tag accent", href: entry?.page ?? "#/training", title: doing }, id);
  });
  return h(
    "section",
    { class: "panel lane", "aria-label": `Lane ${lane.lane}` },
    h(
      "div",
      { class: "spread" },
      h("h3", {}, size === 1 ? "One subject alone" : `${size} subjects in one pack`),
      h(
        "span",
        { class: "muted small numeric" },
        lane.images_per_second ? `${decimal(lane.images_per_second, 1)} images/s` : "starting",
      ),
    ),
    h(
      "div",
      { class: "tags" },
      chips,
      lane.others > 0 && h("span", { class: "tag" }, `${count(lane.others, "subject")} of other tenants`),
    ),
  );
}

function queue(fleet) {
  if (!fleet.waiting) return null;
  const others = fleet.waiting - fleet.waiting_mine;
  return h(
    "section",
    { class: "panel lane", "aria-label": "Queue" },
    h("h3", {}, `${count(fleet.waiting, "subject")} ${fleet.waiting === 1 ? "waits" : "wait"}`),
    h(
      "p",
      { class: "muted small" },
      others ? `${fleet.waiting_mine} of yours, ${others} of other tenants.` : "All of them are yours.",
    ),
  );
}

function row(first, refresh) {
  const picture = face(first);
  const tag = h("span", {});
  const line = h("p", { class: "small" });
  const bar = h("i");
  const meter = h(
    "div",
    {
      class: "meter",
      role: "progressbar",
      "aria-label": `Progress of ${first.id}`,
      "aria-valuemin": 0,
      "aria-valuemax": 100,
    },
    bar,
  );
  const buttons = h("div", { class: "row entry-controls" });
  const node = h(
    "li",
    { class: "entry" },
    h("a", { class: "entry-face", href: first.page, tabindex: "-1", "aria-hidden": "true" }, picture),
    h(
      "div",
      { class: "entry-body" },
      h(
        "div",
        { class: "row" },
        h("a", { class: "entry-name", href: first.page }, first.id),
        tag,
        first.group && h("span", { class: "muted small" }, first.group),
        h("span", { class: "muted small entry-when" }, when(first.created)),
      ),
      line,
      meter,
    ),
    buttons,
  );
  let known = "";
  const show = (entry) => {
    const [text, tone] = tagOf(entry);
    tag.className = `tag ${tone}`;
    tag.textContent = text;
    line.textContent = lineOf(entry);
    line.className = `small ${entry.status === "failed" ? "entry-failed" : "muted"}`;
    bar.style.setProperty("width", `${share(entry) * 100}%`);
    meter.setAttribute("aria-valuenow", Math.round(share(entry) * 100));
    meter.hidden = entry.ended;
    void picture.look(entry);
    if (known !== entry.status) put(buttons, entry.kind === "job" && controls(entry, refresh));
    known = entry.status;
  };
  return { node, show };
}

function byPlace(a, b) {
  const order = (one) => (one.status === "running" ? 0 : one.status === "queued" ? 1 : 2);
  return order(a) - order(b) || (a.progress.place ?? 0) - (b.progress.place ?? 0) || a.id.localeCompare(b.id);
}

function nothing(base) {
  return h(
    "div",
    { class: "empty" },
    h("h2", {}, "Nothing has been trained yet"),
    h(
      "p",
      {},
      "Bring 5 to 20 photos of a person, a pet or a thing. Several subjects train together in about the time of one.",
    ),
    h(
      "div",
      { class: "actions" },
      h("a", { class: "button main-action", href: "#/subjects" }, "Add your photos"),
      demoButton(base),
    ),
  );
}
