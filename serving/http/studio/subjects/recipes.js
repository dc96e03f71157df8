/** How a subject is trained: a few settings with names, of which each can be changed. */

import { choice, field, number } from "../frame/fields.js";
import { h, put } from "../frame/dom.js";

const SMALL_BASE = {
  sample_prompts: ["in the snow", "at night", "in the water", "in the desert"],
  lora: {
    rank: 8,
    targets: ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"],
  },
  prior: { images: 35, captions: true, guidance_scale: 2, steps: 15 },
  train: { max_steps: 350, learning_rate: 0.004, text_encoder_learning_rate: 0.002, checkpoint_every: 50 },
};
const RECIPES = {
  usual: { text: "Balanced", train: { max_steps: 1000, checkpoint_every: 200 } },
  quick: { text: "Quick", prior: { images: 100 }, train: { max_steps: 500, checkpoint_every: 100 } },
  careful: { text: "Careful", lora: { rank: 16 }, train: { max_steps: 1600, checkpoint_every: 200 } },
  small: { text: "For the small base", ...SMALL_BASE },
};

/** The fields of a draft's recipe; they change `draft.settings`. `changed` is called when what is cropped changes. */
export function recipeFields(draft, base, changed) {
  const known = Object.entries(RECIPES).filter(([key]) => (key === "small") === (base === "pocket") || key !== "small");
  draft.recipe ??= base === "pocket" ? "small" : "usual";
  const details = h("div", { class: "fields" });
  const take = () => {
    const { text, sample_prompts: places, ...settings } = structuredClone(RECIPES[draft.recipe]);
    draft.settings = settings;
    if (places) draft.settings.sample_prompts = places.map((place) => `${draft.prompt} ${place}`);
    draft.settings.train.sample_every = Math.ceil(settings.train.max_steps / 7);
    show();
  };
  const show = () => {
    const { train } = draft.settings;
    const set = (group, name) => (value) => {
      draft.settings[group] ??= {};
      if (value === null) delete draft.settings[group][name];
      else draft.settings[group][name] = value;
    };
    put(
      details,
      field("Steps", number(train.max_steps, { min: 1 }, set("train", "max_steps"))),
      field(
        "Learning rate",
        number(train.learning_rate, { min: 0, step: "any", placeholder: "0.0001" }, set("train", "learning_rate")),
      ),
      field("Checkpoint every", number(train.checkpoint_every, { min: 1 }, set("train", "checkpoint_every"))),
      field("Class images", number(draft.settings.prior?.images, { min: 1, placeholder: 200 }, set("prior", "images"))),
      field("Rank", number(draft.settings.lora?.rank, { min: 1, max: 320, placeholder: 8 }, set("lora", "rank"))),
      field(
        "Crop",
        choice(
          [
            ["", "Centre"],
            ["face", "Face"],
            ["random", "Random"],
            ["bucket", "None: keep the shape"],
          ],
          train.crop ?? "",
          (value) => {
            set("train", "crop")(value || null);
            changed();
          },
        ),
      ),
    );
  };
  if (draft.settings.train) show();
  else take();
  const list = choice(
    known.map(([key, recipe]) => [key, recipe.text]),
    draft.recipe,
    (value) => {
      draft.recipe = value;
      take();
    },
  );
  return [field("Recipe", list), h("details", { class: "more" }, h("summary", {}, "Settings"), h("div", {}, details))];
}

/** Prompts of the samples follow the trigger word. */
export function refreshPrompts(draft) {
  const places = RECIPES[draft.recipe]?.sample_prompts;
  if (places) draft.settings.sample_prompts = places.map((place) => `${draft.prompt} ${place}`);
}
