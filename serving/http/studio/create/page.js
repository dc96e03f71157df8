/** Create: the form, what is being drawn, and the history. */

import { listAdapters, showAdapter } from "../api/adapters.js";
import { server } from "../api/server.js";
import { h, put } from "../frame/dom.js";
import { confirmed } from "../frame/dialog.js";
import { link, settle } from "../frame/router.js";
import { tell } from "../frame/notice.js";
import * as past from "../pictures/past.js";
import * as served from "../pictures/served.js";
import { draftOf, emptyDraft, saveDraft, savedDraft } from "../pictures/recipe.js";
import { Batch } from "./batch.js";
import { composer } from "./composer.js";
import { portrait } from "./picker.js";

const PAGE = 12;
const PLACES = ["on the beach", "in the snow", "at night", "in the water"];

/** The page. `?adapter=` puts an adapter into the form. */
export async function createPage({ query, signal }) {
  const { base, defaults } = await server();
  const draft = savedDraft();
  const wanted = query.get("adapter");
  if (wanted) await wear(draft, wanted);
  const feed = h("div", { class: "feed-list" });
  const more = h("div", { class: "feed-more" });
  const blank = h("div");
  const form = composer(draft, defaults, (now) => {
    put(blank);
    const batch = Batch.start(desk, now);
    feed.prepend(batch.node);
    if (matchMedia("(max-width: 900px)").matches) batch.node.scrollIntoView({ behavior: "smooth", block: "start" });
  });
  const history = defaults.history ? served : past;
  const desk = {
    base,
    history,
    defaults,
    signal,
    load: (record) => form.load(draftOf(record)),
    start: (picture) => form.load({ ...draft, start: picture }),
  };

  let last = null;
  async function older() {
    const found = await history.batches(PAGE, last);
    feed.append(...found.map((records) => Batch.of(desk, records).node));
    last = found.at(-1)?.[0].batch ?? last;
    put(
      more,
      found.length === PAGE &&
        h("button", { class: "button", type: "button", onclick: () => older().catch(tell) }, "Show earlier pictures"),
      feed.childElementCount > 0 &&
        h("button", { class: "button quiet danger", type: "button", onclick: clear }, "Clear the history"),
    );
    if (!feed.childElementCount) put(blank, await firstSteps(form));
  }
  async function clear() {
    const sure = await confirmed(
      "Clear the history?",
      `All pictures that ${history.WHERE} are deleted. Adapters are not touched.`,
      "Delete them",
    );
    if (!sure) return;
    await history.forgetAll();
    put(feed);
    put(more);
    put(blank, await firstSteps(form));
  }
  older().catch(tell);
  if (wanted) settle(link(["create"]));
  return h(
    "div",
    { class: "create" },
    h("h1", { class: "sr", tabindex: "-1" }, "Create"),
    h("div", { class: "create-form" }, form),
    h("section", { class: "feed", "aria-label": "History" }, blank, feed, more),
  );
}

async function wear(draft, name) {
  const adapter = await showAdapter(name).catch(tell);
  if (!adapter) return;
  const plain = `${adapter.tenant}/${adapter.id}`;
  Object.assign(draft, {
    ...emptyDraft(),
    size: draft.size,
    adapters: [{ id: name.includes("@") ? `${plain}@${adapter.version}` : plain, weight: 1 }],
  });
  const says = adapter.card.instance_prompt || adapter.trigger;
  draft.prompt = says ? `${says} ${PLACES[0]}` : "";
  saveDraft(draft);
}

/** What is shown where nothing has been drawn yet: examples of what the adapters can do, or how to come by one. */
async function firstSteps(form) {
  const { trains, defaults } = await server();
  const adapters = await listAdapters();
  const own = adapters.filter((one) => one.trigger).slice(0, 4);
  if (!own.length) return noAdapters(trains);
  const example = (adapter, at) => {
    const prompt = `a photo of a ${adapter.trigger} ${PLACES[at % PLACES.length]}`;
    return h(
      "button",
      {
        class: "example",
        type: "button",
        onclick: () => {
          form.load({
            ...emptyDraft(),
            n: Math.min(4, defaults.largest_n),
            prompt,
            adapters: [{ id: `${adapter.tenant}/${adapter.id}`, weight: 1 }],
          });
          form.requestSubmit();
        },
      },
      portrait(adapter),
      h("span", {}, h("b", {}, adapter.id), h("span", { class: "muted" }, prompt)),
    );
  };
  return h(
    "div",
    { class: "empty first" },
    h("h2", {}, "Draw your first picture"),
    h("p", {}, "Describe it and choose adapters on the form, or begin with one of these."),
    h("div", { class: "examples" }, own.map(example)),
  );
}

function noAdapters(trains) {
  return h(
    "div",
    { class: "empty first" },
    h("h2", {}, "No adapters yet"),
    h(
      "p",
      {},
      "An adapter is what the server learns from 5 to 20 photos of a subject: a person, a pet, a thing. The base alone draws without one.",
    ),
    h(
      "div",
      { class: "actions" },
      trains && h("a", { class: "button main-action", href: "#/subjects" }, "Train a subject"),
      h("a", { class: "button", href: "#/adapters" }, "Upload an adapter"),
    ),
    !trains && h("pre", {}, "dreamfleet train manifest.yaml"),
  );
}
