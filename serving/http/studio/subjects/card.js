/** The card of a draft: who it is, its photos with what was found, how it is trained. */

import { h, icon, ICONS, put } from "../frame/dom.js";
import { field } from "../frame/fields.js";
import { count } from "../frame/format.js";
import { problemBox } from "../frame/notice.js";
import { consentFields, isPerson, needsConsent } from "./consent.js";
import { chosenFiles } from "./drop.js";
import { photoTile } from "./photo.js";
import { recipeFields, refreshPrompts } from "./recipes.js";

const WAIT_MS = 500;

/** The card. `desk`: {base, adapters, rules, start(draft), removed()}. */
export function draftCard(draft, desk) {
  const photos = h("ul", { class: "photos" });
  const state = h("span", { class: "muted small", role: "status" });
  const found = h("div", { class: "stack" });
  const says = h("p", { class: "small muted" });
  const consent = consentFields(draft);
  const tiles = new Map();
  let timer = null;

  function place() {
    for (const photo of draft.photos) {
      if (!tiles.has(photo))
        tiles.set(
          photo,
          photoTile(
            draft,
            photo,
            () => take(photo),
            () => (state.textContent = "captions changed"),
          ),
        );
    }
    put(
      photos,
      draft.photos.map((photo) => tiles.get(photo).node),
      h("li", { class: "photo add" }, addButton()),
    );
  }

  function take(photo) {
    draft.remove(photo);
    tiles.delete(photo);
    place();
    checkSoon();
  }

  function addButton() {
    const input = h("input", {
      type: "file",
      multiple: true,
      accept: "image/*,.txt",
      class: "sr",
      "aria-label": `More photos of ${draft.id}`,
      onchange: () => add(chosenFiles(input).map(([, file]) => ({ file, caption: "" }))),
    });
    return h("label", { class: "drop" }, icon(ICONS.plus, 20), "Add photos", input);
  }

  function add(more) {
    draft.add(more);
    place();
    checkSoon();
  }

  function checkSoon() {
    clearTimeout(timer);
    timer = setTimeout(check, WAIT_MS);
    state.textContent = "checking…";
  }

  async function check() {
    await draft.check();
    if (draft.fresh || draft.problem) show();
  }

  function show() {
    const { problems, warnings, error, photos: good } = draft.found;
    put(
      found,
      draft.problem && problemBox(draft.problem),
      error && problemBox(error),
      warnings.map((one) => problemBox(`${one.message} ${one.advice}`, "warn")),
      isPerson(draft.className, desk.rules) &&
        draft.info?.unchecked.map((text) => h("p", { class: "muted small" }, text)),
    );
    for (const tile of tiles.values()) tile.show();
    const bad = problems.length ? `, ${problems.length} not used` : "";
    state.textContent = draft.info ? `${count(good, "good photo")}${bad}` : count(draft.photos.length, "photo");
  }

  async function propose(event) {
    const button = event.currentTarget;
    if (!form.check()) return;
    button.disabled = true;
    state.textContent = "asking for captions…";
    try {
      const { taken, errors } = await draft.propose();
      show();
      state.textContent = taken
        ? `${count(taken, "caption")} proposed: read and correct them`
        : "every photo that is used has a caption";
      if (errors.length) put(found, errors.map((one) => problemBox(one)));
    } catch (error) {
      show();
      put(found, problemBox(error));
    } finally {
      button.disabled = false;
    }
  }

  const text = () => {
    const known = desk.adapters.some((one) => one.id === draft.id);
    const shown = draft.className ? `Prompts say “${draft.prompt.replace("{class}", draft.className)}”. ` : "";
    says.textContent = `${shown}${known ? `${draft.id} exists: this will be a new version of it.` : ""}`;
    consent.show(needsConsent(draft.className, desk.rules));
  };
  const bind = (name) => (event) => {
    draft[name] = event.target.value;
    refreshPrompts(draft);
    text();
  };
  const id = h("input", {
    value: draft.id,
    required: true,
    maxlength: 63,
    pattern: "[a-z0-9][a-z0-9._\\-]{0,62}",
    title: "Lower case letters, digits, dot, underscore and dash.",
    spellcheck: "false",
    oninput: bind("id"),
  });
  const kind = h("input", {
    value: draft.className,
    required: true,
    maxlength: 60,
    placeholder: "dog",
    list: "classes",
    oninput: bind("className"),
  });
  const word = h("input", {
    value: draft.word,
    required: true,
    maxlength: 60,
    spellcheck: "false",
    oninput: bind("word"),
  });
  const submit = (event) => {
    event.preventDefault();
    void desk.start([draft]);
  };
  const form = h(
    "form",
    { class: "panel draft", "aria-label": `Subject ${draft.id}`, onsubmit: submit },
    h(
      "div",
      { class: "draft-fields" },
      field("Id", id, "The adapter's name."),
      field("Class", kind, "What it is: dog, woman, cup."),
      field("Trigger word", word, "A rare word that stands for it."),
      recipeFields(draft, desk.base, () => tiles.forEach((tile) => tile.show())),
    ),
    says,
    consent.node,
    photos,
    h(
      "div",
      { class: "spread" },
      state,
      h("button", { class: "button quiet small", type: "button", onclick: propose }, "Propose captions"),
    ),
    found,
    h(
      "div",
      { class: "spread" },
      h(
        "button",
        {
          class: "button quiet danger small",
          type: "button",
          onclick: () => {
            draft.drop();
            desk.removed();
          },
        },
        icon(ICONS.trash, 15),
        "Remove",
      ),
      h("button", { class: "button main-action" }, "Train"),
    ),
  );
  form.check = () => form.reportValidity();
  form.fail = (error) => put(found, problemBox(error));
  place();
  text();
  show();
  if (!draft.info && !draft.problem) checkSoon();
  return form;
}
