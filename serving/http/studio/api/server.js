/** What the server is: its base with its defaults and limits, and who calls. Asked once. */

import { get, Problem } from "./http.js";

export const SAMPLERS = ["ddim", "euler", "euler_a", "dpm++_2m", "euler_karras", "euler_a_karras", "dpm++_2m_karras"];
let asked = null;

/**
 * {base, defaults, caller, trains}: `defaults` are a request's, `caller` is {tenant, scopes} where the server tells,
 * `trains` is whether it takes subjects to train.
 */
export function server() {
  asked ??= ask().catch((error) => {
    asked = null;
    throw error;
  });
  return asked;
}

/** Asks again when it is needed the next time: the key has changed. */
export function forgetServer() {
  asked = null;
}

async function ask() {
  const [models, caller] = await Promise.all([get("/v1/models?limit=1"), callerNow()]);
  const base = models.data.find((model) => model.defaults);
  return { base: base.id, defaults: base.defaults, caller, trains: caller !== null };
}

/** Who calls; null where the server makes images only and has no such call. */
async function callerNow() {
  try {
    return await get("/v1/me");
  } catch (error) {
    if (error instanceof Problem && error.status === 404) return null;
    throw error;
  }
}
