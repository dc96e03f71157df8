/** The fields of how pictures are drawn: size, steps, guidance, sampler, what to avoid. */

import { choice, field, number } from "../frame/fields.js";
import { openDialog } from "../frame/dialog.js";
import { h } from "../frame/dom.js";
import { SAMPLERS } from "../api/server.js";

/** The fields of `draft`, which they change; `defaults` are the server's. Calls `changed` after each change. */
export function settingsFields(draft, defaults, changed) {
  const set = (name) => (value) => {
    draft[name] = value === "" ? null : value;
    changed();
  };
  const negative =
    defaults.negative_prompt &&
    h("input", {
      value: draft.negative_prompt ?? "",
      placeholder: "blurry, text",
      maxlength: 2000,
      oninput: (event) => set("negative_prompt")(event.target.value),
    });
  return [
    h(
      "div",
      { class: "fields" },
      field("Size", sizeChoice(draft, defaults, set("size"))),
      field(
        "Steps",
        number(draft.steps, { min: 1, max: defaults.largest_steps, placeholder: defaults.steps }, set("steps")),
      ),
      field(
        "Guidance",
        number(
          draft.guidance_scale,
          { min: 0, max: 30, step: 0.5, placeholder: defaults.guidance_scale },
          set("guidance_scale"),
        ),
      ),
      field(
        "Sampler",
        choice(
          [["", `${defaults.scheduler} (default)`], ...SAMPLERS.filter((one) => one !== defaults.scheduler)],
          draft.scheduler ?? "",
          set("scheduler"),
        ),
      ),
    ),
    negative && field("Avoid", negative),
  ];
}

function sizeChoice(draft, defaults, set) {
  const side = Number(defaults.size.split("x")[0]);
  const fit = (share) =>
    Math.max(defaults.multiple, Math.round((side * share) / defaults.multiple) * defaults.multiple);
  const shapes = [
    ["Square", 1, 1],
    ["Wide", 1.5, 1],
    ["Tall", 1, 1.5],
    ["Large", 1.5, 1.5],
    ["Panorama", 2, 1],
  ];
  const options = shapes.map(([text, across, down]) => {
    const size = `${fit(across)}x${fit(down)}`;
    return [size === defaults.size ? "" : size, `${text} ${size.replace("x", " × ")}`];
  });
  if (draft.size === defaults.size) draft.size = null;
  if (draft.size && !options.some(([size]) => size === draft.size))
    options.push([draft.size, draft.size.replace("x", " × ")]);
  const list = choice(options, draft.size ?? "", async (value) => {
    if (value !== "other") return set(value);
    const size = (await askSize(defaults)) ?? "";
    if (size && ![...list.options].some((one) => one.value === size))
      list.add(new Option(size.replace("x", " × "), size), list.options.length - 1);
    list.value = size;
    set(size);
  });
  list.add(new Option("Other…", "other"));
  return list;
}

function askSize(defaults) {
  const side = { min: defaults.multiple, max: defaults.largest_side, step: defaults.multiple };
  const size = defaults.size.split("x").map(Number);
  return openDialog("Size", (close) =>
    h(
      "form",
      {
        class: "stack",
        onsubmit: (event) => {
          event.preventDefault();
          close(size.join("x"));
        },
      },
      h(
        "div",
        { class: "fields" },
        field(
          "Width",
          number(size[0], side, (value) => (size[0] = value)),
        ),
        field(
          "Height",
          number(size[1], side, (value) => (size[1] = value)),
        ),
      ),
      h("p", { class: "small muted" }, `In pixels: multiples of ${side.step} up to ${side.max}.`),
      h("div", { class: "dialog-end" }, h("button", { class: "button main-action" }, "Use this size")),
    ),
  );
}
