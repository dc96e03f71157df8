/** Drawing: requests for images, and what comes of them. */

import { send } from "./http.js";
import { eventsOf } from "./events.js";

const PREVIEWS = 3;

/**
 * Draws. Yields {kind: "preview", index, step, steps, picture} while it draws, then {kind: "done", index, picture,
 * seed, adapters, size, id} for each picture; pictures are Blobs, `id` is the history's where the server keeps one.
 */
export async function* draw(body, { signal, previews = PREVIEWS } = {}) {
  const json = { ...body, stream: true, partial_images: previews };
  const response = await send("POST", "/v1/images/generations", { json, signal });
  for await (const { data } of eventsOf(response)) {
    const picture = blobOf(data.b64_json, data.output_format);
    if (data.type === "image_generation.completed") {
      const { seed, adapters, size, id } = data;
      yield { kind: "done", index: data.image_index, picture, seed, adapters, size, id };
    } else {
      yield { kind: "preview", index: data.image_index, step: data.step, steps: data.steps, picture };
    }
  }
}

/** The one picture of a request, without previews. Where the server has too much to do, it waits and asks again. */
export async function drawOne(body, { signal } = {}) {
  for (;;) {
    try {
      for await (const event of draw({ ...body, n: 1 }, { signal, previews: 0 })) {
        if (event.kind === "done") return event;
      }
      throw new Error("The server sent no picture.");
    } catch (error) {
      if (error.code !== "rate_limit_exceeded") throw error;
      await pause((error.retryAfter ?? 1) * 1000, signal);
    }
  }
}

/** Waits; throws AbortError when `signal` is aborted. */
export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });
}

/** A Blob as base64, as requests hold pictures. */
export async function base64Of(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

function blobOf(base64, format) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}
