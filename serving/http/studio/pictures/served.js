/** The history of a server that keeps one: the same functions as `past.js`, over its calls. */

import { clearHistory, deleteEntry, listHistory, pictureOf } from "../api/history.js";

export const WHERE = "the server keeps of you";
const PAGE = 100;

/** The record of a picture that the server has just made, and keeps under `record.id`. */
export async function keep(record) {
  return { ...record, time: Date.now() };
}

/** The latest `count` batches before the batch `before`, each a list of records in order. */
export async function batches(count, before = null) {
  const groups = new Map();
  let last = before;
  for (let more = true; more; ) {
    const page = await listHistory(last, PAGE);
    more = page.has_more && page.data.length > 0;
    for (const entry of page.data) {
      if (groups.size === count && !groups.has(entry.request)) {
        more = false;
        break;
      }
      groups.set(entry.request, [...(groups.get(entry.request) ?? []), entry]);
      last = entry.id;
    }
  }
  const reading = [...groups.values()].map((entries) => Promise.all(entries.map((one) => recordOf(one, last))));
  return (await Promise.all(reading))
    .map((records) => records.filter(Boolean).sort((a, b) => a.index - b.index))
    .filter((records) => records.length > 0);
}

export const forget = deleteEntry;
export const forgetAll = clearHistory;

/** The record of an entry; null if its picture is gone. `batch` is where the next page begins. */
async function recordOf(entry, batch) {
  const picture = await pictureOf(entry);
  if (picture === null) return null;
  const { prompt, negative_prompt, steps, guidance_scale, scheduler, settings } = entry;
  const body = { prompt, negative_prompt, steps, guidance_scale, scheduler, ...settings };
  return {
    id: entry.id,
    batch,
    index: entry.index,
    time: entry.created * 1000,
    body,
    start: null,
    picture,
    seed: entry.seed,
    adapters: entry.adapters,
    size: entry.size,
    base: entry.model,
  };
}
