/** One subject in training, live: loss, samples, checkpoints, what happened. */

import { follow } from "../api/training.js";
import { chart } from "../charts/chart.js";
import { h, icon, ICONS, put } from "../frame/dom.js";
import { date, decimal, span, when } from "../frame/format.js";
import { problemBox, tell } from "../frame/notice.js";
import { poll } from "../frame/poll.js";
import { link } from "../frame/router.js";
import { picture } from "../pictures/picture.js";
import { view } from "../pictures/viewer.js";
import { checkpointTable } from "./checkpoints.js";
import { controls } from "./controls.js";
import { showEntry } from "./entries.js";
import { listSamples } from "./samples.js";
import { lineOf, share, tagOf } from "./words.js";

const POLL_MS = 2000;
const SMOOTH = 0.15; // the weight of a new loss in the mean

/** The page of job/<id> or run/<run>/<subject>. */
export async function subjectPage({ parts, signal }) {
  let entry = await showEntry(parts, { signal });
  document.title = `${entry.id} · dreamfleet`;
  const tag = h("span");
  const line = h("p", {});
  const bar = h("i");
  const actions = h("div", { class: "page-head-actions" });
  const problems = h("div", { class: "stack" });
  const facts = h("dl", { class: "facts" });
  const samples = samplesPanel();
  const checkpoints = h("section", { class: "panel", hidden: true, "aria-label": "Checkpoints" });
  const story = storyPanel(entry);
  let known = "";

  async function refresh() {
    entry = await showEntry(parts, { signal });
    show();
    await samples.show(entry, signal);
    put(checkpoints, await checkpointTable(entry, signal, refresh));
    checkpoints.hidden = !checkpoints.childElementCount;
  }

  function show() {
    const [text, tone] = tagOf(entry);
    tag.className = `tag ${tone}`;
    tag.textContent = text;
    line.textContent = entry.status === "failed" ? "" : lineOf(entry);
    bar.style.setProperty("width", `${share(entry) * 100}%`);
    put(
      problems,
      entry.status === "failed" && problemBox(entry.error?.message ?? "It failed."),
      entry.progress.warnings.map((text) => problemBox(text, "warn")),
    );
    put(
      facts,
      factsOf(entry)
        .filter(([, value]) => value)
        .map(([name, value]) => [h("dt", {}, name), h("dd", { class: "numeric" }, value)]),
    );
    if (known === entry.status) return;
    known = entry.status;
    put(actions, entry.status === "succeeded" && done(entry), controls(entry, refresh));
  }

  show();
  void refresh().catch(tell);
  void poll(POLL_MS, signal, () => (entry.ended ? null : refresh()));
  void listen(entry, story, signal)
    .then(refresh)
    .catch(() => {});
  return h(
    "div",
    {},
    h("a", { class: "back", href: "#/training" }, icon(ICONS.back, 16), "Training"),
    h(
      "div",
      { class: "page-head" },
      h("div", {}, h("div", { class: "row" }, h("h1", { tabindex: "-1" }, entry.id), tag), line),
      actions,
    ),
    h("div", { class: "meter wide" }, bar),
    problems,
    h(
      "div",
      { class: "two-columns" },
      h("div", { class: "stack" }, story.loss, samples.node, checkpoints),
      h("div", { class: "stack" }, h("section", { class: "panel", "aria-label": "Facts" }, facts), story.log),
    ),
  );
}

function done(entry) {
  const [tenant, id] = entry.adapter.split("/");
  return [
    h("a", { class: "button main-action", href: link(["create"], { adapter: entry.adapter }) }, "Draw with it"),
    h("a", { class: "button", href: link(["adapters", tenant, id]) }, "Open the adapter"),
  ];
}

function factsOf({ progress, finish, created, run, group, settings, ended }) {
  return [
    ["Step", `${progress.step} of ${progress.max_steps}`],
    ["Loss", progress.loss === null || progress.loss === undefined ? null : decimal(progress.loss, 4)],
    ["Images/s", progress.images_per_second ? decimal(progress.images_per_second, 1) : null],
    ["Pack", progress.together ? `${progress.together}, on lane ${progress.lane}` : null],
    ["Queue", progress.place ? String(progress.place) : null],
    ["Finish", finish && !ended && finish > Date.now() / 1000 ? `${when(finish)}, ${date(finish)}` : null],
    ["Trained", progress.seconds ? span(progress.seconds) : null],
    ["Submitted", date(created)],
    ["Attempts", progress.attempts.length > 1 ? String(progress.attempts.length) : null],
    ["Prompt", settings?.instance_prompt?.replaceAll("{class}", settings.class ?? "")],
    [group ? "Run" : "Job", h("code", {}, run)],
  ];
}

/** The loss curve and the log; both grow with `add`. */
function storyPanel(entry) {
  const points = [];
  const data = () => ({
    series: [
      { name: "loss", color: "var(--line-strong)", points },
      { name: "average", color: "var(--curve-1)", points: averaged(points) },
    ],
    x: "step",
    low: 0,
    height: 240,
  });
  const curve = chart(data());
  const list = h("ol", { class: "story" });
  const add = (event) => {
    if (entry.kind === "run" && !event.message.startsWith(`${entry.id}:`)) return;
    const { step, train_loss: loss } = event.data;
    if (event.type === "metrics" && Number.isFinite(loss)) {
      while (points.length && points.at(-1)[0] >= step) points.pop(); // it went back to a checkpoint
      points.push([step, loss]);
      curve.show(data());
      return;
    }
    list.prepend(
      h(
        "li",
        { class: event.level },
        h("span", { class: "muted small numeric" }, new Date(event.created_at * 1000).toLocaleTimeString("en-GB")),
        h("span", {}, event.message.replace(`${entry.id}: `, "")),
      ),
    );
  };
  return {
    add,
    loss: h("section", { class: "panel", "aria-label": "Loss" }, h("h2", {}, "Loss"), curve),
    log: h("section", { class: "panel", "aria-label": "What happened" }, h("h2", {}, "What happened"), list),
  };
}

/** The running mean of a curve: single losses jump, as each step sees other noise. */
function averaged(points) {
  let mean = null;
  return points.map(([x, y]) => [x, (mean = mean === null ? y : mean + (y - mean) * SMOOTH)]);
}

async function listen(entry, story, signal) {
  for await (const event of follow(entry.kind === "job" ? entry.base : entry.control, { signal })) story.add(event);
}

/** The samples, a row for each step, the latest first. */
function samplesPanel() {
  const rows = h("div", { class: "sample-rows" });
  const node = h("section", { class: "panel", "aria-label": "Samples", hidden: true }, h("h2", {}, "Samples"), rows);
  let known = 0;
  const show = async (entry, signal) => {
    const found = await listSamples(entry, { signal });
    if (found.length === known) return;
    known = found.length;
    node.hidden = !known;
    const items = found.map((one) => ({
      path: one.url,
      title: `${entry.id}, step ${one.step}`,
      facts: [["Step", String(one.step)]],
    }));
    const steps = [...new Set(found.map((one) => one.step))].sort((a, b) => b - a);
    put(
      rows,
      steps.map((step) =>
        h(
          "div",
          { class: "sample-row" },
          h("span", { class: "muted small numeric" }, `step ${step}`),
          found.map(
            (one, at) =>
              one.step === step &&
              h(
                "button",
                {
                  class: "tile",
                  type: "button",
                  "aria-label": `Sample ${one.index + 1} of step ${step}`,
                  onclick: () => view(items, at),
                },
                picture(() => one.url),
              ),
          ),
        ),
      ),
    );
  };
  return { node, show };
}
