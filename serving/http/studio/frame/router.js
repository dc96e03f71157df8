/** Addresses after the `#`: which page they name, and with what. */

/** The parts and the query of the address now: `#/adapters/ann/rusty?step=3`. */
export function address() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { parts: path.split("/").filter(Boolean).map(decodeURIComponent), query: new URLSearchParams(query) };
}

/** The address of a page. */
export function link(parts, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(given).toString();
  return `#/${parts.map(encodeURIComponent).join("/")}${text ? `?${text}` : ""}`;
}

/** Goes to a page; `replace` leaves no step back. */
export function go(where, { replace = false } = {}) {
  if (replace) location.replace(where);
  else location.hash = where;
}

/** Changes the address of the page that is shown, which stays as it is. */
export function settle(where) {
  history.replaceState(null, "", where);
}

/** Shows the page of the address afresh. */
export function refresh() {
  dispatchEvent(new Event("hashchange"));
}

/** Calls `show` now and at every change of the address. */
export function follow(show) {
  addEventListener("hashchange", show);
  show();
}
