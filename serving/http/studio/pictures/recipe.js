/** What makes a picture: a draft as the forms edit it, the request that it is, and the words that describe it. */

import { base64Of } from "../api/images.js";
import { decimal, short } from "../frame/format.js";

const PLACE = "dreamfleet.draft";
const LARGEST_START = 1536; // pixels a side
export const SETTINGS = ["size", "steps", "guidance_scale", "scheduler", "negative_prompt"];

/** A draft: `adapters` are {id, weight}; what is null is the server's default; `start` is a Blob. */
export function emptyDraft() {
  return {
    prompt: "",
    adapters: [],
    n: 4,
    seed: null,
    size: null,
    steps: null,
    guidance_scale: null,
    scheduler: null,
    negative_prompt: "",
    start: null,
    strength: 0.7,
  };
}

/** The draft as it was left, without its start picture. */
export function savedDraft() {
  try {
    const saved = JSON.parse(localStorage.getItem(PLACE) ?? "{}");
    return { ...emptyDraft(), ...(Array.isArray(saved.adapters) ? saved : {}), start: null };
  } catch {
    return emptyDraft();
  }
}

/** Keeps the draft for the next visit. */
export function saveDraft(draft) {
  try {
    localStorage.setItem(PLACE, JSON.stringify({ ...draft, start: null }));
  } catch {
    // then it is gone with the page
  }
}

/** The request of a draft, without its start picture. */
export function bodyOf(draft) {
  const body = { prompt: draft.prompt.trim(), n: draft.n };
  if (draft.adapters.length) body.adapters = draft.adapters.map(({ id, weight }) => ({ id, weight }));
  if (draft.seed !== null) body.seed = draft.seed;
  for (const name of SETTINGS) if (draft[name]) body[name] = draft[name];
  if (draft.guidance_scale === 0) body.guidance_scale = 0;
  if (draft.start) body.strength = draft.strength;
  return body;
}

/** A request with its start picture in it. */
export async function withStart(body, start) {
  return start ? { ...body, image: await base64Of(await shrunk(start)) } : body;
}

/** A picture no larger than a start picture need be; as it is where the browser cannot read it: the server says why. */
async function shrunk(blob) {
  const bitmap = await createImageBitmap(blob).catch(() => null);
  const scale = bitmap && LARGEST_START / Math.max(bitmap.width, bitmap.height);
  if (!scale || scale >= 1) return blob;
  const canvas = new OffscreenCanvas(Math.round(bitmap.width * scale), Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/png" });
}

/** The draft that makes a picture of the history again: with its own seed, and the versions that it was made with. */
export function draftOf(record) {
  const { body } = record;
  return {
    ...emptyDraft(),
    prompt: body.prompt,
    adapters: record.adapters.map(({ id, version, weight }) => ({ id: `${id}@${version}`, weight })),
    n: 1,
    seed: record.seed,
    ...Object.fromEntries(SETTINGS.map((name) => [name, body[name] ?? null])),
    size: record.size,
    negative_prompt: body.negative_prompt ?? "",
    start: record.start ?? null,
    strength: body.strength ?? 0.7,
  };
}

/** What a picture was made with, as [name, value] to show. */
export function factsOf(record, defaults) {
  const { body } = record;
  return [
    [
      "Adapters",
      record.adapters
        .map(({ id, version, weight }) => `${nameOf(id)} ${decimal(weight)} (${short(version)})`)
        .join(", ") || "none",
    ],
    ["Seed", String(record.seed)],
    ["Size", record.size],
    ["Steps", String(body.steps ?? defaults?.steps ?? "")],
    ["Guidance", String(body.guidance_scale ?? defaults?.guidance_scale ?? "")],
    ["Sampler", body.scheduler ?? defaults?.scheduler],
    ["Avoided", body.negative_prompt],
    ["Start", record.start ? `a picture, ${decimal(body.strength)} redrawn` : null],
    ["Base", record.base],
  ];
}

/** A name without its version, and without the tenant `mine`. */
export function nameOf(name, mine = null) {
  const plain = name.split("@")[0];
  const [tenant, id] = plain.includes("/") ? plain.split("/") : [mine, plain];
  return tenant === null || tenant === mine || tenant === "default" ? id : `${tenant}/${id}`;
}

/** The name of a picture's file. */
export function fileName(record) {
  const words = record.body.prompt
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, "-")
    .slice(0, 50)
    .replace(/^-|-$/g, "");
  return `${words || "picture"}-${record.seed}.png`;
}
