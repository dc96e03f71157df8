/** Adapters: lists, cards, files, changes. A name is `<tenant>/<id>`, with `@<version>` where one is meant. */

import { all, call, get, path, send } from "./http.js";

/** All adapters that the caller may use, its own first: {id, tenant, version, trigger, public, ...}. */
export function listAdapters(options) {
  return all("/v1/adapters", options);
}

/** One adapter with its card; `name` may have a version. */
export function showAdapter(name, options) {
  return get(`/v1/adapters/${name.split("/").map(encodeURIComponent).join("/").replace("%40", "@")}`, options);
}

/** All versions of an own adapter, newest first. */
export async function listVersions(id, options) {
  return (await get(path("v1", "adapters", id, "versions"), options)).data;
}

/** The path of a file of a version. */
export function filePath(id, version, name) {
  return `${path("v1", "adapters", id, "versions", version, "files")}/${name.split("/").map(encodeURIComponent).join("/")}`;
}

/** The path of a version as a file for another program. */
export function exportPath(id, version, format) {
  return `${path("v1", "adapters", id, "versions", version, "export")}?format=${format}`;
}

const samples = new Map();

/** The paths of the samples of a version of an own adapter, in order. A version never changes, so this is kept. */
export async function samplePaths(id, version, options) {
  const key = `${id}@${version}`;
  if (!samples.has(key)) {
    const { data } = await get(path("v1", "adapters", id, "versions", version, "files"), options);
    const names = data.map((file) => file.name).filter((name) => /^samples\/.*\.(png|jpe?g|webp)$/.test(name));
    names.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    samples.set(
      key,
      names.map((name) => filePath(id, version, name)),
    );
  }
  return samples.get(key);
}

/** Changes visibility, trigger or served version of an own adapter: {public, trigger, version}. */
export function changeAdapter(id, change) {
  return call("PATCH", path("v1", "adapters", id), change);
}

/** Deletes an own adapter with all its versions. */
export function deleteAdapter(id) {
  return send("DELETE", path("v1", "adapters", id));
}

/** Deletes a version that is not served. */
export function deleteVersion(id, version) {
  return send("DELETE", path("v1", "adapters", id, "versions", version));
}

/** Uploads a safetensors file as an adapter. */
export async function uploadAdapter({ file, id, trigger, isPublic }) {
  const form = new FormData();
  form.set("file", file);
  form.set("id", id);
  form.set("trigger", trigger);
  form.set("public", String(isPublic));
  return (await send("POST", "/v1/adapters", { form })).json();
}
