/** The form in which pictures are described: prompt, adapters, how many, seed, settings. */

import { h, icon, ICONS, put } from "../frame/dom.js";
import { field, joined, number, textarea } from "../frame/fields.js";
import { problemBox } from "../frame/notice.js";
import { saveDraft } from "../pictures/recipe.js";
import { mixField } from "./mix.js";
import { settingsFields } from "./settings.js";
import { startField } from "./start.js";

/** The form. `submit` is called with the draft; the form has `load` for another draft, and `fail` for a problem. */
export function composer(draft, defaults, submit) {
  const form = h("form", { class: "composer panel", "aria-label": "What to draw" });
  const changed = () => saveDraft(draft);

  function show() {
    const prompt = textarea(
      {
        rows: 3,
        value: draft.prompt,
        maxlength: 20000,
        required: true,
        placeholder: "a photo of a sks dog in the snow",
      },
      (text) => {
        draft.prompt = text;
        changed();
      },
    );
    const seed = number(draft.seed, { min: 0, max: Number.MAX_SAFE_INTEGER, placeholder: "random" }, (value) => {
      draft.seed = value;
      changed();
    });
    const roll = () => {
      draft.seed = draft.seed === null ? Math.floor(Math.random() * 2 ** 31) : null;
      seed.value = draft.seed ?? "";
      changed();
    };
    const count = number(draft.n, { min: 1, max: defaults.largest_n }, (value) => {
      draft.n = value ?? 1;
      changed();
    });
    const trigger = h("div", { class: "row" });
    const offer = (adapter) => {
      const says = adapter.trigger || "";
      if (!says || draft.prompt.includes(says)) return put(trigger);
      put(
        trigger,
        h(
          "button",
          {
            class: "button small",
            type: "button",
            onclick: () => {
              draft.prompt = draft.prompt ? `${draft.prompt.trim()} ${says}` : `a photo of a ${says}`;
              prompt.value = draft.prompt;
              prompt.grow();
              put(trigger);
              prompt.focus();
              changed();
            },
          },
          icon(ICONS.plus, 15),
          `Say “${says}”`,
        ),
      );
    };
    const problems = h("div", { "aria-live": "assertive" });
    put(
      form,
      field("Prompt", prompt),
      mixField(draft, defaults, changed, { added: offer }),
      trigger,
      h(
        "div",
        { class: "fields pair" },
        field("Pictures", count),
        joined(
          "Seed",
          seed,
          h(
            "button",
            {
              class: "button icon",
              type: "button",
              "aria-label": "Another seed, or a random one",
              title: "Another seed, or a random one",
              onclick: roll,
            },
            icon(ICONS.dice),
          ),
        ),
      ),
      h(
        "details",
        { class: "more", open: draft.start !== null || draft.size !== null },
        h("summary", {}, "Size, sampler, start picture"),
        h("div", {}, settingsFields(draft, defaults, changed), startField(draft, changed)),
      ),
      problems,
      h(
        "div",
        { class: "composer-end" },
        h("button", { class: "button main-action", type: "submit" }, "Draw"),
        h(
          "span",
          { class: "muted small keys" },
          h("kbd", {}, navigator.platform?.startsWith("Mac") ? "⌘" : "Ctrl"),
          " + ",
          h("kbd", {}, "Enter"),
        ),
      ),
    );
    form.fail = (error) => put(problems, error && problemBox(error));
    form.focusPrompt = () => prompt.focus();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    form.fail(null);
    submit({ ...draft, adapters: draft.adapters.map((one) => ({ ...one })) });
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.load = (other) => {
    Object.assign(draft, other);
    changed();
    show();
    scrollTo({ top: 0, behavior: "smooth" });
    form.focusPrompt();
  };
  show();
  return form;
}
