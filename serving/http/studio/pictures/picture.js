/** Pictures that need a key to be read: fetched, kept as object URLs, shown when they come into view. */

import { send } from "../api/http.js";
import { h } from "../frame/dom.js";

const KEPT = 400;
const urls = new Map();

/** An object URL of the picture at `path`; the same for the same path. */
export function pictureUrl(path) {
  if (!urls.has(path)) {
    const asked = send("GET", path)
      .then((response) => response.blob())
      .then((blob) => URL.createObjectURL(blob));
    asked.catch(() => urls.delete(path));
    urls.set(path, asked);
    trim();
  }
  return urls.get(path);
}

/** An img that loads when it is nearly in view. `source` gives a path, now or later; none: it stays empty. */
export function picture(source, alt = "", attributes = {}) {
  const shown = h("img", { alt, decoding: "async", ...attributes });
  whenSeen(shown, async () => {
    try {
      const path = await source();
      if (path) shown.src = await pictureUrl(path);
      else shown.dispatchEvent(new CustomEvent("nothing"));
    } catch {
      shown.dispatchEvent(new CustomEvent("nothing"));
    }
  });
  return shown;
}

/** An img of a Blob, whose URL is given back once it is loaded. */
export function blobPicture(blob, alt = "", attributes = {}) {
  const shown = h("img", { alt, decoding: "async", ...attributes });
  showBlob(shown, blob);
  return shown;
}

/** Shows another Blob in an img. */
export function showBlob(shown, blob) {
  const url = URL.createObjectURL(blob);
  shown.onload = shown.onerror = () => URL.revokeObjectURL(url);
  shown.src = url;
}

/** Gives a file to the person. */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

let watcher = null;
const waiting = new WeakMap();

function whenSeen(node, work) {
  watcher ??= new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        watcher.unobserve(target);
        waiting.get(target)?.();
      }
    },
    { rootMargin: "300px" },
  );
  waiting.set(node, work);
  watcher.observe(node);
}

function trim() {
  for (const [path, asked] of urls) {
    if (urls.size <= KEPT) return;
    urls.delete(path);
    asked.then(
      (url) => setTimeout(() => URL.revokeObjectURL(url), 60_000),
      () => {},
    );
  }
}
