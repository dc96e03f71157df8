/**
 * The history: every picture that was drawn here, with everything that made it, in this browser's own database.
 *
 * A record: {id, owner, batch, index, time, body, start, picture, seed, adapters, size, base}. `body` is the request
 * without its start picture, which is the Blob `start`; `adapters` are the versions that were used.
 */

import { heldKey } from "../frame/key.js";

export const WHERE = "this browser keeps of you";
const KEPT = 600;
let opened = null;
const fallback = []; // where the browser has no database, as in some private windows

/** Whose history it is: pictures of one key are not shown to another. */
export function owner() {
  let high = 0x811c9dc5;
  let low = 0x1b873593;
  for (const letter of heldKey()) {
    high = Math.imul(high ^ letter.charCodeAt(0), 0x01000193);
    low = Math.imul(low ^ letter.charCodeAt(0), 0x85ebca6b);
  }
  return heldKey() ? (high >>> 0).toString(36) + (low >>> 0).toString(36) : "";
}

/** A new batch's name; names sort by time. */
export function newBatch() {
  return `${Date.now().toString(36).padStart(10, "0")}-${Math.random().toString(36).slice(2, 8)}`;
}

/** Keeps a picture and returns its record with its id. */
export async function keep(record) {
  const kept = { ...record, owner: owner(), time: Date.now() };
  const database = await open();
  if (database === null) {
    fallback.push({ ...kept, id: fallback.length + 1 });
    return fallback.at(-1);
  }
  const store = database.transaction("pictures", "readwrite").objectStore("pictures");
  kept.id = await done(store.add(kept));
  void trim(database);
  return kept;
}

/** The latest `count` batches before the batch `before`, each a list of records in order. */
export async function batches(count, before = null) {
  const database = await open();
  if (database === null)
    return grouped(
      fallback.filter((one) => one.owner === owner() && (!before || one.batch < before)),
      count,
    );
  const end = before === null ? [owner(), "~"] : [owner(), before];
  const range = IDBKeyRange.bound([owner(), ""], end, false, true);
  const index = database.transaction("pictures").objectStore("pictures").index("batch");
  const found = [];
  await new Promise((resolve, reject) => {
    const request = index.openCursor(range, "prev");
    const seen = new Set();
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      const cursor = request.result;
      if (cursor === null || (!seen.has(cursor.value.batch) && seen.size === count)) return resolve();
      seen.add(cursor.value.batch);
      found.push(cursor.value);
      cursor.continue();
    };
  });
  return grouped(found, count);
}

/** Removes one picture. */
export async function forget(id) {
  const database = await open();
  if (database === null)
    return void fallback.splice(
      fallback.findIndex((one) => one.id === id),
      1,
    );
  await done(database.transaction("pictures", "readwrite").objectStore("pictures").delete(id));
}

/** Removes every picture of this key. */
export async function forgetAll() {
  for (const batch of await batches(Infinity)) for (const record of batch) await forget(record.id);
}

function grouped(records, count) {
  const groups = new Map();
  for (const record of records) groups.set(record.batch, [...(groups.get(record.batch) ?? []), record]);
  const sorted = [...groups.entries()].sort(([a], [b]) => (a < b ? 1 : -1)).slice(0, count);
  return sorted.map(([, group]) => group.sort((a, b) => a.index - b.index));
}

function open() {
  opened ??= new Promise((resolve) => {
    try {
      const request = indexedDB.open("dreamfleet", 1);
      request.onupgradeneeded = () => {
        const store = request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
        store.createIndex("batch", ["owner", "batch"]);
      };
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return opened;
}

/** Removes the oldest pictures beyond the number that is kept. */
async function trim(database) {
  const store = database.transaction("pictures", "readwrite").objectStore("pictures");
  const over = (await done(store.count())) - KEPT;
  if (over <= 0) return;
  const oldest = await done(store.getAllKeys(null, over));
  for (const key of oldest) store.delete(key);
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
