/** Elements: the one way in which this app makes them. What is given as a child is text, never markup. */

const SVG = "http://www.w3.org/2000/svg";
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "open", "selected", "indeterminate", "readOnly"]);

/**
 * An HTML element. `attributes`: `onclick` and the like are listeners, `class` a string, `style` an object of
 * properties, `data` an object of data attributes; null and false leave an attribute out.
 */
export function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An SVG element. */
export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

/** Takes all children out of `node` and puts `children` in. */
export function put(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter(isShown));
  return node;
}

/** A line icon of 24 units by its paths' data; decoration only. */
export function icon(path, size = 18) {
  return svg(
    "svg",
    {
      viewBox: "0 0 24 24",
      width: size,
      height: size,
      fill: "none",
      stroke: "currentColor",
      "stroke-width": 1.8,
      "stroke-linecap": "round",
      "stroke-linejoin": "round",
      "aria-hidden": "true",
    },
    svg("path", { d: path }),
  );
}

/** The icons that are used more than once. */
export const ICONS = {
  close: "M6 6l12 12M18 6L6 18",
  plus: "M12 5v14M5 12h14",
  search: "M11 4a7 7 0 1 0 0 14a7 7 0 0 0 0-14zM20 20l-4-4",
  download: "M12 4v11m-5-4 5 5 5-5M5 20h14",
  trash: "M5 7h14M10 7V4.5h4V7m-7 0 .8 12.5h8.4L17 7",
  again: "M4 12a8 8 0 0 1 13.7-5.6L20 8.5M20 4v4.5h-4.500M20 12a8 8 0 0 1-13.700 5.600L4 15.500M4 20v-4.500h4.500",
  stop: "M7 7h10v10H7z",
  back: "M15 5l-7 7 7 7",
  next: "M9 5l7 7-7 7",
  dice: "M4 7h3l9 10h4M4 17h3l3-3.300M13 10.300L16 7h4M17.500 4.500L20 7l-2.500 2.500M17.500 14.500L20 17l-2.500 2.500",
  picture: "M4 5h16v14H4zM4 16l5-5 5 5 2.500-2.500L20 17M15.500 9.500h.01",
  warning: "M12 4l9 16H3zM12 10v4M12 17h.01",
  good: "M5 12.500l4.500 4.500L19 7.500",
  key: "M14.500 4.500a5 5 0 1 1-3.600 8.500L9 15H7v2H5v2H3v-3l6.500-6.500a5 5 0 0 1 5-5zM16 8h.01",
};

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.setAttribute("class", value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (PROPERTIES.has(name)) node[name] = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  const shown = children.flat(Infinity).filter(isShown);
  node.append(...shown);
  // a select has no value before it has options
  if (node instanceof HTMLSelectElement && attributes?.value !== undefined) node.value = attributes.value;
  return node;
}

function isShown(child) {
  return child !== null && child !== undefined && child !== false;
}
