/** Form fields with their labels. */

import { h } from "./dom.js";

let made = 0;

/** A field with a label above and a hint below; `control` gets the id that the label names. */
export function field(label, control, hint = null) {
  control.id ||= `field-${++made}`;
  const about = hint && h("span", { class: "hint", id: `${control.id}-hint` }, hint);
  if (about) control.setAttribute("aria-describedby", about.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, about);
}

/** A field whose control lies beside a button. */
export function joined(label, control, button, hint = null) {
  const made = field(label, control, hint);
  const pair = h("div", { class: "joined" });
  control.replaceWith(pair);
  pair.append(control, button);
  return made;
}

/** A list to choose from: options are texts or [value, text]. */
export function choice(options, value, onchange) {
  return h(
    "select",
    { value, onchange: (event) => onchange?.(event.target.value) },
    options.map((one) => {
      const [key, text] = Array.isArray(one) ? one : [one, one];
      return h("option", { value: key }, text);
    }),
  );
}

/** A number; `oninput` gets it, or null where the field is empty. */
export function number(value, { min, max, step = 1, placeholder = null }, oninput) {
  return h("input", {
    type: "number",
    inputmode: "decimal",
    value: value ?? "",
    min,
    max,
    step,
    placeholder,
    oninput: (event) => oninput(event.target.value === "" ? null : Number(event.target.value)),
  });
}

/** A slider that shows how far it is. */
export function slider(label, value, { min, max, step }, oninput) {
  const shade = () => control.style.setProperty("--filled", `${((control.value - min) / (max - min)) * 100}%`);
  const control = h("input", {
    type: "range",
    min,
    max,
    step,
    "aria-label": label,
    oninput: () => {
      shade();
      oninput(Number(control.value));
    },
  });
  control.value = value;
  shade();
  control.show = (now) => {
    control.value = now;
    shade();
  };
  return control;
}

/** A few choices side by side: [value, text]. */
export function segments(label, options, value, onchange) {
  const buttons = options.map(([key, text]) =>
    h(
      "button",
      {
        type: "button",
        "aria-pressed": String(key === value),
        onclick: (event) => {
          for (const button of buttons) button.setAttribute("aria-pressed", String(button === event.currentTarget));
          onchange(key);
        },
      },
      text,
    ),
  );
  return h("div", { class: "switch", role: "group", "aria-label": label }, buttons);
}

/** A textarea that grows with its text. */
export function textarea(attributes, oninput) {
  const grow = () => {
    area.style.setProperty("height", "auto");
    area.style.setProperty("height", `${area.scrollHeight + 2}px`);
  };
  const area = h("textarea", {
    ...attributes,
    oninput: () => {
      grow();
      oninput?.(area.value);
    },
  });
  area.grow = grow;
  requestAnimationFrame(grow);
  return area;
}
