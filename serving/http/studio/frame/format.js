/** Numbers, sizes and times as people read them. */

const PLAIN = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const SPAN = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
const DATE = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short", hourCycle: "h23" });
const UNITS = [
  ["year", 31557600],
  ["month", 2629800],
  ["week", 604800],
  ["day", 86400],
  ["hour", 3600],
  ["minute", 60],
];

/** 12345 as "12,345". */
export function whole(number) {
  return PLAIN.format(number);
}

/** A number with so many digits after the point. */
export function decimal(number, digits = 2) {
  return Number(number).toFixed(digits);
}

/** Bytes as "1.3 MB". */
export function bytes(count) {
  for (const [unit, size] of [
    ["GB", 1e9],
    ["MB", 1e6],
    ["KB", 1e3],
  ]) {
    if (count >= size) return `${(count / size).toFixed(count >= size * 100 ? 0 : 1)} ${unit}`;
  }
  return `${count} bytes`;
}

/** Seconds since the epoch as "3 hours ago", "in 2 minutes". */
export function when(seconds) {
  const away = seconds - Date.now() / 1000;
  for (const [unit, size] of UNITS) {
    if (Math.abs(away) >= size) return SPAN.format(Math.trunc(away / size), unit);
  }
  return Math.abs(away) < 10 ? "just now" : SPAN.format(Math.trunc(away), "second");
}

/** Seconds since the epoch as a date with its time. */
export function date(seconds) {
  return DATE.format(new Date(seconds * 1000));
}

/** A span of seconds as "1 h 20 min", "4 min", "12 s". */
export function span(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  const minutes = Math.round(seconds / 60);
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** "1 photo", "5 photos". */
export function count(number, one, many = `${one}s`) {
  return `${whole(number)} ${number === 1 ? one : many}`;
}

/** The first characters of a version. */
export function short(version) {
  return version.slice(0, 8);
}
