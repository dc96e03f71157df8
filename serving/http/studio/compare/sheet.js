/** A sheet: pictures in columns and rows, drawn a few at a time, so that the server draws them together. */

import { drawOne } from "../api/images.js";
import { h, icon, ICONS, put } from "../frame/dom.js";
import { problemBox } from "../frame/notice.js";
import { link } from "../frame/router.js";
import { blobPicture, download } from "../pictures/picture.js";
import { factsOf, fileName, saveDraft, draftOf } from "../pictures/recipe.js";
import { view } from "../pictures/viewer.js";
import { cellBody } from "./plan.js";

const AT_ONCE = 6;

/** The sheet of a plan; it begins to draw at once. `desk`: {base, defaults, signal}. */
export function sheet(desk, plan, columns, rows) {
  const stop = new AbortController();
  desk.signal.addEventListener("abort", () => stop.abort());
  const state = h("span", { class: "muted", role: "status" });
  const buttons = h("div", { class: "row" });
  const problems = h("div");
  const cells = rows.map((row) =>
    columns.map((column) => ({
      row,
      column,
      node: h("button", {
        class: "tile waiting",
        type: "button",
        disabled: true,
        "aria-label": `${column.title}, seed ${row.seed}`,
      }),
      record: null,
    })),
  );
  const flat = cells.flat();

  async function run() {
    put(
      buttons,
      h("button", { class: "button small", type: "button", onclick: () => stop.abort() }, icon(ICONS.stop, 15), "Stop"),
    );
    const queue = [...flat];
    let done = 0;
    const say = () => (state.textContent = `${done} of ${flat.length} drawn`);
    say();
    const work = async () => {
      for (let cell = queue.shift(); cell; cell = queue.shift()) {
        cell.record = await drawCell(cell);
        done += 1;
        say();
      }
    };
    try {
      await Promise.all(Array.from({ length: AT_ONCE }, work));
    } catch (error) {
      stop.abort();
      if (error.name !== "AbortError") put(problems, problemBox(error));
    }
    for (const cell of flat) if (!cell.record) cell.node.classList.replace("waiting", "missing");
    put(
      buttons,
      done > 0 &&
        h(
          "button",
          { class: "button small", type: "button", onclick: () => save(cells, columns, rows) },
          icon(ICONS.download, 16),
          "Download the sheet",
        ),
    );
  }

  async function drawCell(cell) {
    const body = cellBody(plan, cell.column, cell.row);
    const { picture, seed, adapters, size } = await drawOne(body, { signal: stop.signal });
    const record = { body, picture, seed, adapters, size, base: desk.base, start: null, time: Date.now() };
    put(cell.node, blobPicture(picture, `${cell.column.title}: ${cell.row.prompt}, seed ${seed}`));
    cell.node.classList.remove("waiting");
    cell.node.disabled = false;
    cell.node.addEventListener("click", () => open(cell));
    return record;
  }

  function open(cell) {
    const drawn = flat.filter((one) => one.record);
    void view(
      drawn.map((one) => item(one, desk)),
      drawn.indexOf(cell),
    );
  }

  void run();
  return h(
    "section",
    { class: "sheet", "aria-label": "Comparison" },
    h("div", { class: "spread" }, state, buttons),
    problems,
    table(cells, columns),
  );
}

function table(cells, columns) {
  let said = null;
  return h(
    "div",
    { class: "sheet-scroll", tabindex: "0", role: "region", "aria-label": "Pictures by column" },
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("td", {}),
          columns.map((one) => h("th", { scope: "col" }, h("b", {}, one.title), h("span", {}, one.note))),
        ),
      ),
      h(
        "tbody",
        {},
        cells.map((line) => {
          const { prompt, seed } = line[0].row;
          const fresh = prompt !== said;
          said = prompt;
          return h(
            "tr",
            { class: fresh ? "fresh" : null },
            h(
              "th",
              { scope: "row" },
              fresh ? h("b", {}, prompt) : h("b", { class: "sr" }, prompt),
              h("span", {}, `seed ${seed}`),
            ),
            line.map((cell) => h("td", {}, cell.node)),
          );
        }),
      ),
    ),
  );
}

function item({ record, column }, desk) {
  return {
    blob: record.picture,
    title: record.body.prompt,
    name: fileName(record),
    facts: [["Column", column.title], ...factsOf(record, desk.defaults)],
    actions: [
      [
        "Use in Create",
        () => {
          saveDraft(draftOf(record));
          location.hash = link(["create"]);
        },
        "main-action",
      ],
    ],
  };
}

/** The sheet as one PNG file. */
async function save(cells, columns, rows) {
  const first = cells.flat().find((cell) => cell.record);
  const sample = await createImageBitmap(first.record.picture);
  const grow = Math.max(1, Math.round(192 / sample.width));
  const [wide, high, gap, top, left] = [sample.width * grow, sample.height * grow, 8, 40, 220];
  const canvas = h("canvas", { width: left + columns.length * (wide + gap), height: top + rows.length * (high + gap) });
  const paper = canvas.getContext("2d");
  paper.fillStyle = "#fff";
  paper.fillRect(0, 0, canvas.width, canvas.height);
  paper.fillStyle = "#222";
  paper.font = "14px system-ui, sans-serif";
  columns.forEach((one, at) => paper.fillText(one.title, left + at * (wide + gap), 26, wide));
  for (const [down, line] of cells.entries()) {
    paper.fillText(line[0].row.prompt, 10, top + down * (high + gap) + 20, left - 20);
    paper.fillText(`seed ${line[0].row.seed}`, 10, top + down * (high + gap) + 40, left - 20);
    for (const [across, cell] of line.entries()) {
      if (!cell.record) continue;
      paper.drawImage(
        await createImageBitmap(cell.record.picture),
        left + across * (wide + gap),
        top + down * (high + gap),
        wide,
        high,
      );
    }
  }
  canvas.toBlob((blob) => download(blob, "comparison.png"));
}
