/** Calls of the server's HTTP API. Its errors are sentences for people, and are shown as they are. */

import { heldKey } from "../frame/key.js";

/** What the server refused, in its own words; `field` is what it names, `code` what programs go by. */
export class Problem extends Error {
  constructor(status, { message, code = null, param = null }, retryAfter = null) {
    super(message);
    this.name = "Problem";
    this.status = status;
    this.code = code;
    this.field = param;
    this.retryAfter = retryAfter;
  }
}

/** The response of a call that went well. `json` or `form` is the body. Throws Problem, or AbortError. */
export async function send(method, path, { json, form, signal, headers = {} } = {}) {
  const given = { ...headers };
  if (heldKey()) given.Authorization = `Bearer ${heldKey()}`;
  if (json !== undefined) given["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method,
      signal,
      headers: given,
      body: json === undefined ? form : JSON.stringify(json),
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { message: "The server cannot be reached. Check that it runs, then try again." });
  }
  if (response.ok) return response;
  const problem = await problemOf(response);
  if (response.status === 401) document.dispatchEvent(new CustomEvent("key-needed", { detail: problem.message }));
  throw problem;
}

/** The JSON that a GET returns. */
export async function get(path, options) {
  return (await send("GET", path, options)).json();
}

/** The JSON that a call with a JSON body returns. */
export async function call(method, path, json, options = {}) {
  return (await send(method, path, { json, ...options })).json();
}

/** Everything in a list that comes in pages; at most `most`. */
export async function all(path, options, most = 5000) {
  const found = [];
  for (let after = null; ;) {
    const joint = path.includes("?") ? "&" : "?";
    const page = await get(after === null ? path : `${path}${joint}after=${encodeURIComponent(after)}`, options);
    found.push(...page.data);
    if (!page.has_more || found.length >= most) return found;
    after = page.last_id ?? page.data.at(-1).id;
  }
}

/** A key under which the server makes something once. */
export function onceKey() {
  return crypto.randomUUID?.() ?? String(Math.random()).slice(2);
}

/** A path with its parts encoded. */
export function path(...parts) {
  return `/${parts.map(encodeURIComponent).join("/")}`;
}

async function problemOf(response) {
  let told = null;
  try {
    told = (await response.json()).error;
  } catch {
    // no JSON: something before the server has answered
  }
  const message = told?.message ?? `The server answered ${response.status} ${response.statusText}.`.trim();
  return new Problem(response.status, { ...told, message }, Number(response.headers.get("retry-after")) || null);
}
