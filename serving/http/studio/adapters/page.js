/** One adapter: its samples, how it was judged, its versions, and what can be done with it. */

import { samplePaths, showAdapter } from "../api/adapters.js";
import { server } from "../api/server.js";
import { h, icon, ICONS, put } from "../frame/dom.js";
import { bytes, date, short, whole } from "../frame/format.js";
import { go, link, refresh } from "../frame/router.js";
import { isMine, portrait } from "../create/picker.js";
import { picture } from "../pictures/picture.js";
import { view } from "../pictures/viewer.js";
import { scoresPanel } from "./scores.js";
import { downloadsPanel, ownerPanel } from "./sharing.js";
import { versionsPanel } from "./versions.js";

/** The page of `<tenant>/<id>`, with `?version=`. */
export async function adapterPage({ parts, query, signal }) {
  const name = parts.join("/");
  const version = query.get("version");
  const adapter = await showAdapter(version ? `${name}@${version}` : name, { signal });
  const mine = await isMine(adapter);
  const { trains } = await server();
  const { card } = adapter;
  document.title = `${adapter.id} · dreamfleet`;
  const plain = `${adapter.tenant}/${adapter.id}`;
  const worn = version ? `${plain}@${adapter.version}` : plain;
  const reload = () => go(link(["adapters", adapter.tenant, adapter.id]));
  const head = h(
    "div",
    { class: "page-head" },
    h(
      "div",
      {},
      h("h1", { tabindex: "-1" }, adapter.id),
      h("p", {}, card.instance_prompt ? ["Say ", h("q", {}, card.instance_prompt), "."] : "An uploaded adapter."),
    ),
    h(
      "div",
      { class: "page-head-actions" },
      h("a", { class: "button main-action", href: link(["create"], { adapter: worn }) }, "Draw with it"),
      h("a", { class: "button", href: link(["compare"], { adapters: worn }) }, "Compare"),
      h("a", { class: "button", href: link(["compare"], { sweep: worn }) }, "Strength sweep"),
    ),
  );
  const side = h("div", { class: "stack" }, factsPanel(adapter, mine, trains));
  const body = h("div", { class: "stack" }, await samplesPanel(adapter, mine), scoresPanel(card), settingsPanel(card));
  if (mine) {
    side.append(
      await versionsPanel(adapter, adapter.version, () => (version ? reload() : refresh())),
      downloadsPanel(adapter),
      ownerPanel(adapter),
    );
  }
  return h(
    "div",
    {},
    h("a", { class: "back", href: "#/adapters" }, icon(ICONS.back, 16), "Adapters"),
    head,
    h("div", { class: "two-columns" }, body, side),
  );
}

async function samplesPanel(adapter, mine) {
  const paths = mine ? await samplePaths(adapter.id, adapter.version) : [];
  if (!paths.length) return h("div", { class: "panel hero" }, portrait(adapter, "portrait large"));
  const prompts = adapter.card.settings?.sample_prompts ?? [];
  const word = adapter.card.class ?? "";
  const title = (at) => prompts[at]?.replaceAll("{class}", word) ?? `Sample ${at + 1}`;
  const items = paths.map((path, at) => ({
    path,
    title: title(at),
    facts: [
      ["Adapter", adapter.id],
      ["Version", short(adapter.version)],
    ],
  }));
  return h(
    "section",
    { class: "samples", "aria-label": "Samples" },
    paths.map((path, at) =>
      h(
        "figure",
        {},
        h(
          "button",
          { class: "tile", type: "button", "aria-label": title(at), onclick: () => view(items, at) },
          picture(() => path, title(at)),
        ),
        h("figcaption", { class: "muted small" }, title(at)),
      ),
    ),
  );
}

function factsPanel(adapter, mine, trains) {
  const { card } = adapter;
  const facts = [
    ["Trigger", adapter.trigger],
    ["Class", card.class],
    ["Version", h("code", {}, short(adapter.version))],
    ["Made", date(adapter.created)],
    ["Base", adapter.base],
    ["Rank", String(adapter.rank)],
    ["Steps", card.steps ? whole(card.steps) : null],
    ["Loss", card.loss ? card.loss.toFixed(3) : null],
    ["Photos", card.image_hashes?.length ? String(card.image_hashes.length) : null],
    ["Size", bytes(adapter.bytes)],
    ["Run", card.run && runLink(card.run, adapter.id, trains)],
    ["Owner", mine ? null : adapter.tenant],
  ];
  const rows = facts.filter(([, value]) => value).map(([key, value]) => [h("dt", {}, key), h("dd", {}, value)]);
  return h("section", { class: "panel", "aria-label": "Facts" }, h("dl", { class: "facts" }, rows));
}

/** Where its training is shown, if this server trains. */
function runLink(run, id, trains) {
  const parts = run.startsWith("ftjob-") ? ["training", "job", run] : ["training", "run", run, id];
  return trains ? h("a", { href: link(parts) }, run) : run;
}

/** The settings that it was trained with, as they are. */
function settingsPanel(card) {
  if (!card.settings || !Object.keys(card.settings).length) return null;
  const text = h("pre", { class: "settings" });
  const panel = h(
    "details",
    { class: "panel more" },
    h("summary", {}, "All settings of the training"),
    h("div", {}, text),
  );
  panel.addEventListener("toggle", () => put(text, JSON.stringify(card.settings, null, 2)), { once: true });
  return panel;
}
