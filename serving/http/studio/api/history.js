/** The history that the server keeps, where its operator says so. */

import { call, get, path, Problem, send } from "./http.js";

/** Entries older than the id `after`, newest first: {data, has_more, last_id}. */
export function listHistory(after, limit) {
  const from = after === null ? "" : `&after=${encodeURIComponent(after)}`;
  return get(`/v1/images/history?limit=${limit}${from}`);
}

/** The Blob of an entry; null if it is gone meanwhile. */
export async function pictureOf(entry) {
  const link = new URL(entry.url); // its host may be a name that this page may not ask
  try {
    return await (await send("GET", link.pathname.slice(link.pathname.indexOf("/v1/")) + link.search)).blob();
  } catch (error) {
    if (error instanceof Problem && [403, 404, 410].includes(error.status)) return null;
    throw error;
  }
}

/** Deletes one entry. */
export async function deleteEntry(id) {
  try {
    await call("DELETE", path("v1", "images", "history", id));
  } catch (error) {
    if (!(error instanceof Problem && error.status === 404)) throw error; // it is gone already
  }
}

/** Deletes all of the caller's. */
export function clearHistory() {
  return call("DELETE", "/v1/images/history");
}
