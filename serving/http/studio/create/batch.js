/** The pictures of one request: while they are drawn, and afterwards. */

import { draw } from "../api/images.js";
import { h, icon, ICONS, put } from "../frame/dom.js";
import { decimal, when } from "../frame/format.js";
import { problemBox, tell } from "../frame/notice.js";
import { blobPicture, showBlob } from "../pictures/picture.js";
import { newBatch } from "../pictures/past.js";
import { bodyOf, factsOf, fileName, nameOf, withStart } from "../pictures/recipe.js";
import { view } from "../pictures/viewer.js";

/** A batch as the feed shows it. `desk`: {defaults, base, history, load(record), start(blob)}, for its buttons. */
export class Batch {
  constructor(desk, body, count) {
    this.desk = desk;
    this.records = [];
    this.tiles = Array.from({ length: count }, (_, index) => this.tile(index));
    this.state = h("span", { class: "muted small", role: "status" });
    this.buttons = h("div", { class: "row" });
    this.problems = h("div");
    this.node = h(
      "article",
      { class: "batch" },
      h(
        "header",
        { class: "batch-head" },
        h("div", {}, h("h3", {}, body.prompt), h("div", { class: "tags" }, tagsOf(body), this.state)),
        this.buttons,
      ),
      this.problems,
      h(
        "div",
        { class: "pictures" },
        this.tiles.map((tile) => tile.node),
      ),
    );
  }

  /** A batch of the history. */
  static of(desk, records) {
    const batch = new Batch(desk, { ...records[0].body, adapters: records[0].adapters }, records.length);
    records.forEach((record, at) => batch.finish(at, record));
    batch.rest();
    return batch;
  }

  /** Draws what a draft says; the batch is its own feed entry at once. */
  static start(desk, draft) {
    const batch = new Batch(desk, bodyOf(draft), draft.n);
    batch.ended = batch.run(draft);
    return batch;
  }

  async run(draft) {
    const stop = new AbortController();
    const body = bodyOf(draft);
    const name = newBatch();
    this.desk.signal.addEventListener("abort", () => stop.abort());
    this.state.textContent = "waiting";
    put(
      this.buttons,
      h("button", { class: "button small", type: "button", onclick: () => stop.abort() }, icon(ICONS.stop, 15), "Stop"),
    );
    let done = 0;
    try {
      for await (const event of draw(await withStart(body, draft.start), { signal: stop.signal })) {
        if (event.kind === "preview") {
          this.tiles[event.index].preview(event);
          this.state.textContent = `step ${event.step} of ${event.steps}`;
        } else {
          const { picture, seed, adapters, size } = event;
          const record = {
            ...(event.id && { id: event.id }),
            batch: name,
            index: event.index,
            body,
            start: draft.start,
            picture,
            seed,
            adapters,
            size,
            base: this.desk.base,
          };
          this.finish(event.index, await this.desk.history.keep(record).catch(() => ({ ...record, time: Date.now() })));
          done += 1;
          this.state.textContent = `${done} of ${draft.n} done`;
        }
      }
      this.rest();
    } catch (error) {
      this.tiles.filter((tile) => !tile.done).forEach((tile) => tile.node.remove());
      if (error.name !== "AbortError") put(this.problems, problemBox(error));
      if (done) this.rest();
      else if (error.name === "AbortError") this.node.remove();
      else {
        this.state.textContent = "";
        put(
          this.buttons,
          h("button", { class: "button quiet small", type: "button", onclick: () => this.node.remove() }, "Dismiss"),
        );
      }
    }
  }

  tile(index) {
    const bar = h("i", { class: "tile-bar" });
    const node = h(
      "button",
      {
        class: "tile waiting",
        type: "button",
        disabled: true,
        "aria-label": `Picture ${index + 1}`,
        onclick: () => this.open(index),
      },
      bar,
    );
    let shown = null;
    return {
      node,
      done: false,
      preview({ picture, step, steps }) {
        if (shown) showBlob(shown, picture);
        else node.prepend((shown = blobPicture(picture)));
        bar.style.setProperty("--done", `${(step / steps) * 100}%`);
      },
      finish(record) {
        this.done = true;
        node.classList.remove("waiting");
        node.disabled = false;
        put(node, blobPicture(record.picture, `${record.body.prompt}, seed ${record.seed}`));
      },
    };
  }

  finish(at, record) {
    this.records[at] = record;
    this.tiles[at].finish(record);
  }

  /** What can be done with it when all of it is there. */
  rest() {
    const first = this.records.find(Boolean);
    this.state.textContent = when(first.time / 1000);
    put(
      this.buttons,
      h(
        "button",
        {
          class: "button quiet small",
          type: "button",
          title: "Put its prompt, adapters, seed and settings into the form",
          onclick: () => this.desk.load(first),
        },
        icon(ICONS.again, 15),
        "Use again",
      ),
      h(
        "button",
        {
          class: "button quiet icon small",
          type: "button",
          "aria-label": "Delete these pictures",
          title: "Delete these pictures",
          onclick: () => this.remove(),
        },
        icon(ICONS.trash, 16),
      ),
    );
  }

  async remove() {
    try {
      for (const record of this.records.filter((one) => one?.id)) await this.desk.history.forget(record.id);
      this.node.remove();
    } catch (error) {
      tell(error);
    }
  }

  open(index) {
    const records = this.records.filter(Boolean);
    void view(
      records.map((record) => this.item(record)),
      records.indexOf(this.records[index]),
    );
  }

  item(record) {
    return {
      blob: record.picture,
      title: record.body.prompt,
      time: record.time,
      name: fileName(record),
      facts: factsOf(record, this.desk.defaults),
      actions: [
        ["Use again", () => this.desk.load(record), "main-action"],
        ["Start from this", () => this.desk.start(record.picture)],
      ],
    };
  }
}

function tagsOf(body) {
  const worn = (body.adapters ?? []).map((one) =>
    h("span", { class: "tag accent" }, `${nameOf(one.id)} ${decimal(one.weight)}`),
  );
  return [
    ...worn,
    body.size && h("span", { class: "tag" }, body.size.replace("x", " × ")),
    body.scheduler && h("span", { class: "tag" }, body.scheduler),
  ];
}
