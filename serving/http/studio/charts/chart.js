/** Curves as SVG: drawn at the width there is, read with the pointer, said in words to those who cannot see them. */

import { h, put, svg } from "../frame/dom.js";

const PAD = { left: 44, right: 14, top: 14, bottom: 30 };
const TICKS = 4;

/**
 * A chart. `data`: {series: [{name, points: [[x, y]], color, dashed}], marks: [{x, text}], x, y, height, low, high}.
 * The figure has `show(data)` to draw other data.
 */
export function chart(data) {
  const plot = h("div", { class: "chart-plot" });
  const legend = h("div", { class: "chart-legend" });
  const box = h("figure", { class: "chart" }, plot, legend);
  let now = data;
  const render = () => {
    if (plot.clientWidth) put(plot, drawn(now, plot.clientWidth));
    put(
      legend,
      now.series.length > 1 &&
        now.series.map((one) => h("span", {}, h("i", { style: { background: one.color } }), one.name)),
    );
  };
  new ResizeObserver(render).observe(plot);
  box.show = (next) => {
    now = next;
    render();
  };
  return box;
}

function drawn(data, width) {
  const height = data.height ?? 240;
  const points = data.series.flatMap((one) => one.points);
  if (!points.length) return h("p", { class: "muted small chart-none" }, "Nothing measured yet.");
  const scale = scales(data, points, width, height);
  const root = svg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    width,
    height,
    role: "img",
    "aria-label": inWords(data),
  });
  root.append(...axes(data, scale, width, height));
  for (const mark of data.marks ?? []) root.append(...marked(mark, scale, width, height));
  for (const one of data.series) root.append(...curve(one, scale));
  root.append(reader(data, scale, width, height));
  return root;
}

function scales(data, points, width, height) {
  const xs = points.map(([x]) => x);
  const ys = points.map(([, y]) => y);
  const [left, right] = [Math.min(...xs), Math.max(...xs, Math.min(...xs) + 1)];
  const low = data.low ?? Math.min(...ys);
  const high = Math.max(data.high ?? Math.max(...ys), low + 1e-9);
  return {
    left,
    right,
    low,
    high,
    x: (x) => PAD.left + ((x - left) / (right - left)) * (width - PAD.left - PAD.right),
    y: (y) => height - PAD.bottom - ((y - low) / (high - low)) * (height - PAD.top - PAD.bottom),
  };
}

function axes(data, scale, width, height) {
  const nodes = [];
  for (let tick = 0; tick <= TICKS; tick += 1) {
    const value = scale.low + ((scale.high - scale.low) * tick) / TICKS;
    const y = scale.y(value);
    nodes.push(svg("line", { class: "chart-grid", x1: PAD.left, x2: width - PAD.right, y1: y, y2: y }));
    nodes.push(
      svg(
        "text",
        { class: "chart-text", x: PAD.left - 8, y: y + 4, "text-anchor": "end" },
        brief(value, scale.high - scale.low),
      ),
    );
  }
  const values = places(data, scale, width);
  values.forEach((value, at) => {
    const last = at === values.length - 1;
    const anchor = at === 0 ? "start" : last ? "end" : "middle";
    nodes.push(
      svg(
        "text",
        { class: "chart-text", x: scale.x(value), y: height - 10, "text-anchor": anchor },
        `${last && data.x ? `${data.x} ` : ""}${Math.round(value)}`,
      ),
    );
  });
  return nodes;
}

/** Where the x axis is labelled: at the points themselves where they are few. */
function places(data, scale, width) {
  const most = Math.max(2, Math.min(6, Math.floor(width / 110)));
  const xs = [...new Set(data.series.flatMap((one) => one.points.map(([x]) => x)))].sort((a, b) => a - b);
  if (xs.length <= most) return xs;
  return Array.from({ length: most + 1 }, (_, at) => scale.left + ((scale.right - scale.left) * at) / most);
}

function curve(one, scale) {
  const at = one.points.map(([x, y]) => `${scale.x(x).toFixed(1)},${scale.y(y).toFixed(1)}`);
  const line = svg("polyline", {
    class: "chart-curve",
    points: at.join(" "),
    stroke: one.color,
    "stroke-dasharray": one.dashed ? "5 5" : null,
  });
  const dots =
    one.points.length > 24
      ? []
      : one.points.map(([x, y]) => svg("circle", { cx: scale.x(x), cy: scale.y(y), r: 3.5, fill: one.color }));
  return [line, ...dots];
}

function marked({ x, text }, scale, width, height) {
  const at = scale.x(x);
  const right = at > width / 2;
  return [
    svg("line", { class: "chart-mark", x1: at, x2: at, y1: PAD.top, y2: height - PAD.bottom }),
    svg(
      "text",
      {
        class: "chart-mark-text",
        x: at + (right ? -7 : 7),
        y: height - PAD.bottom - 10,
        "text-anchor": right ? "end" : "start",
      },
      text,
    ),
  ];
}

/** Follows the pointer: a line, and the values of every curve there. */
function reader(data, scale, width, height) {
  const line = svg("line", { class: "chart-hair", y1: PAD.top, y2: height - PAD.bottom });
  const text = svg("text", { class: "chart-read", y: PAD.top - 2 });
  const group = svg("g", { visibility: "hidden" }, line, text);
  const area = svg("rect", { x: 0, y: 0, width, height, fill: "transparent" });
  area.addEventListener("pointermove", (event) => {
    const x = event.clientX - area.getBoundingClientRect().left;
    const all = data.series.flatMap((one) => one.points.map(([value]) => value));
    const near = all.reduce((best, value) =>
      Math.abs(scale.x(value) - x) < Math.abs(scale.x(best) - x) ? value : best,
    );
    const values = data.series
      .map((one) => [one.name, one.points.find(([value]) => value === near)?.[1]])
      .filter(([, y]) => y !== undefined);
    const at = scale.x(near);
    line.setAttribute("x1", at);
    line.setAttribute("x2", at);
    text.textContent = `${data.x ?? ""} ${Math.round(near)}: ${values.map(([name, y]) => `${name} ${brief(y, scale.high - scale.low)}`).join(", ")}`;
    text.setAttribute("x", PAD.left);
    group.setAttribute("visibility", "visible");
  });
  area.addEventListener("pointerleave", () => group.setAttribute("visibility", "hidden"));
  return svg("g", {}, group, area);
}

function inWords(data) {
  return data.series
    .filter((one) => one.points.length)
    .map((one) => {
      const [[from, first], [to, last]] = [one.points[0], one.points.at(-1)];
      return `${one.name}: ${first.toPrecision(3)} at ${data.x ?? "x"} ${from}, ${last.toPrecision(3)} at ${to}`;
    })
    .join("; ");
}

function brief(value, range) {
  if (range >= 20) return String(Math.round(value));
  return value.toFixed(range < 0.1 ? 3 : 2);
}
