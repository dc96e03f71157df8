/** The pictures that are drawn while a subject trains. */

import { get } from "../api/http.js";
import { samplePaths } from "../api/adapters.js";
import { portrait } from "../create/picker.js";
import { h } from "../frame/dom.js";
import { pictureUrl } from "../pictures/picture.js";

/** The samples of a subject, the earliest first: {step, index, url}. */
export async function listSamples(entry, options) {
  return (await get(`${entry.base}/samples`, options)).data;
}

/** The face of a subject: its latest sample, as soon as there is one. `look` shows the latest. */
export function face(entry) {
  const box = portrait({ id: entry.id, tenant: entry.adapter.split("/")[0], version: "" }, "portrait");
  const image = h("img", { alt: "" });
  let shown = null;
  box.append(image);
  box.look = async (now) => {
    const paths =
      now.status === "succeeded" && now.version ? await samplePaths(now.id, now.version).catch(() => []) : [];
    const path = paths[0] ?? (await listSamples(now).catch(() => [])).filter((one) => one.index === 0).at(-1)?.url;
    if (!path || path === shown) return;
    shown = path;
    image.src = await pictureUrl(path);
    box.classList.add("shown");
  };
  return box;
}
