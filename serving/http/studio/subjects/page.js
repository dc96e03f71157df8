/** Subjects: photos in, checked at once, and off to be trained. */

import { listAdapters } from "../api/adapters.js";
import { server } from "../api/server.js";
import { consentRules } from "../api/training.js";
import { h, icon, ICONS, put } from "../frame/dom.js";
import { count } from "../frame/format.js";
import { notify } from "../frame/notice.js";
import { go } from "../frame/router.js";
import { draftCard } from "./card.js";
import { demoButton } from "./demo.js";
import { allDrafts, newDraft } from "./draft.js";
import { byFolder, chosenFiles, droppedFiles } from "./drop.js";
import { keptPanel } from "./kept.js";

const CLASSES = ["person", "man", "woman", "dog", "cat", "car", "cup", "toy", "backpack", "shoe", "house", "style"];

/** The page. */
export async function subjectsPage({ signal }) {
  const [{ base }, adapters, rules] = await Promise.all([
    server(),
    listAdapters({ signal }),
    consentRules({ signal }),
  ]);
  const list = h("div", { class: "stack" });
  const together = h("div", { class: "row" });
  const cards = new Map();
  const desk = { base, adapters, rules, start, removed: show };

  function show() {
    const drafts = allDrafts();
    for (const draft of drafts) if (!cards.has(draft)) cards.set(draft, draftCard(draft, desk));
    put(
      list,
      drafts.map((draft) => cards.get(draft)),
    );
    put(
      together,
      drafts.length > 1 &&
        h(
          "button",
          { class: "button main-action", type: "button", onclick: () => start([...drafts]) },
          `Train all ${drafts.length}`,
        ),
    );
    box.classList.toggle("small", drafts.length > 0);
  }

  async function take(files) {
    const groups = await byFolder(files);
    if (!groups.length) return notify("There is no photo among these files.", { bad: true });
    for (const { folder, photos } of groups) newDraft(folder, photos);
    show();
  }

  async function start(drafts) {
    if (!drafts.every((draft) => cards.get(draft).check())) return;
    let begun = 0;
    for (const draft of drafts) {
      const card = cards.get(draft);
      card.inert = true;
      try {
        await draft.start(base, rules);
        begun += 1;
      } catch (error) {
        card.inert = false;
        card.fail(error);
      }
    }
    show();
    if (begun) notify(`${count(begun, "subject")} in the queue.`);
    if (begun && begun === drafts.length) go("#/training");
  }

  const box = dropBox(take);
  show();
  return h(
    "div",
    {},
    h(
      "div",
      { class: "page-head" },
      h(
        "div",
        {},
        h("h1", { tabindex: "-1" }, "Subjects"),
        h(
          "p",
          {},
          "5 to 20 photos each, in different places and light. Photos are checked at once, before anything trains.",
        ),
      ),
      h("div", { class: "page-head-actions" }, together, demoButton(base)),
    ),
    box,
    list,
    keptPanel(),
    h(
      "datalist",
      { id: "classes" },
      CLASSES.map((name) => h("option", { value: name })),
    ),
  );
}

function dropBox(take) {
  const files = h("input", {
    type: "file",
    multiple: true,
    accept: "image/*,.txt",
    class: "sr",
    "aria-label": "Photos of a subject",
    onchange: () => take(chosenFiles(files)),
  });
  const folders = h("input", {
    type: "file",
    webkitdirectory: true,
    class: "sr",
    "aria-label": "A folder of subjects",
    onchange: () => take(chosenFiles(folders)),
  });
  const over = (event) => {
    event.preventDefault();
    box.classList.toggle("over", event.type === "dragover");
  };
  const box = h(
    "div",
    {
      class: "big-drop",
      ondragover: over,
      ondragleave: over,
      ondrop: async (event) => {
        over(event);
        take(await droppedFiles(event.dataTransfer));
      },
    },
    icon(ICONS.picture, 34),
    h(
      "div",
      {},
      h("h2", {}, "Drop photos here"),
      h(
        "p",
        { class: "muted" },
        "Loose photos are one subject; each folder is a subject of its own. Captions: a text file beside each photo, or captions.txt.",
      ),
    ),
    h(
      "div",
      { class: "row" },
      h("label", { class: "button" }, "Choose photos", files),
      h("label", { class: "button" }, "Choose a folder", folders),
    ),
  );
  return box;
}
