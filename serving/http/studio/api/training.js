/** Training: uploads, jobs, runs, how the fleet stands, what was used, keys. */

import { all, call, get, onceKey, path, send } from "./http.js";
import { eventsOf } from "./events.js";

/** Uploads an archive of photos; the answer holds what the checks found. */
export async function uploadPhotos(blob, name, options) {
  const form = new FormData();
  form.set("purpose", "fine-tune");
  form.set("file", blob, name);
  return (await send("POST", "/v1/files", { form, ...options })).json();
}

/** What was uploaded, the latest first. */
export function listPhotos(options) {
  return all("/v1/files", options);
}

/** Removes an upload. */
export function deletePhotos(id) {
  return send("DELETE", path("v1", "files", id));
}

/** What the server's model proposes as captions of an upload's photos: [{name, caption, error}]. */
export async function proposeCaptions(file, body) {
  return (await call("POST", path("v1", "files", file, "captions"), body)).data;
}

/** Submits one subject; `key` makes sure that it is submitted once. */
export function createJob(body, key) {
  return call("POST", "/v1/fine_tuning/jobs", body, { headers: { "Idempotency-Key": key } });
}

/** Submits the demo's subjects as a run. */
export function createDemo() {
  return call("POST", "/v1/demo", undefined, { headers: { "Idempotency-Key": onceKey() } });
}

/** The latest jobs. */
export async function listJobs(limit, options) {
  return (await get(`/v1/fine_tuning/jobs?limit=${limit}`, options)).data;
}

/** The latest runs. */
export async function listRuns(limit, options) {
  return (await get(`/v1/runs?limit=${limit}`, options)).data;
}

/** The subjects of a run. */
export async function listSubjects(run, options) {
  return (await get(path("v1", "runs", run, "subjects"), options)).data;
}

/** What can be asked of a job or of a whole run: cancel, pause, resume, retry. */
export function ask(base, verb) {
  return call("POST", `${base}/${verb}`, undefined);
}

/** The events of a job or run from the beginning, and on as they come. */
export async function* follow(base, { signal }) {
  const response = await send("GET", `${base}/events?stream=true`, { signal });
  for await (const { data } of eventsOf(response)) yield data;
}

/** The checkpoints of a job or of a run's subject, the latest first; `base` is its path. */
export async function listCheckpoints(base, options) {
  return (await get(`${base}/checkpoints?limit=200`, options)).data;
}

/** Makes a checkpoint the version that is served. */
export function serveCheckpoint(base, checkpoint) {
  return call("POST", `${base}/checkpoints/${checkpoint}/current`, undefined);
}

/** Makes a checkpoint a version beside the one that is served; returns it. */
export function publishCheckpoint(base, checkpoint) {
  return call("POST", `${base}/checkpoints/${checkpoint}/publish`, undefined);
}

/** The lanes and the queue, as the caller may see them. */
export function showFleet(options) {
  return get("/v1/fleet", options);
}

/** Which subjects need a consent: {policy, persons}. */
export function consentRules(options) {
  return get("/v1/fleet/consent", options);
}

/** What the caller's tenant has used since a day. */
export function showUsage(since, options) {
  return get(`/v1/usage?since=${since}`, options);
}

/** All keys; for admins. */
export function listKeys(options) {
  return all("/v1/keys", options);
}

/** All tenants with quotas and use; for admins. */
export function listTenants(options) {
  return all("/v1/tenants", options);
}
