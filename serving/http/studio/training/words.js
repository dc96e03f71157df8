/** How a subject stands, in words. */

import { count, decimal, span, when } from "../frame/format.js";

const TONE = { queued: "", running: "accent", succeeded: "good", failed: "bad", cancelled: "", paused: "warn" };
const DOING = { preparing: "reading photos", training: "training", evaluating: "judging checkpoints" };

/** The tag of a status: [text, tone]. */
export function tagOf(entry) {
  const { status, progress } = entry;
  const text = status === "running" ? (DOING[progress.doing ?? progress.state] ?? progress.doing ?? "running") : status;
  return [status === "succeeded" && progress.state === "reused" ? "published before" : text, TONE[status] ?? ""];
}

/** One line about it. */
export function lineOf(entry) {
  const { status, progress, finish } = entry;
  if (status === "failed") return entry.error?.message ?? "It failed.";
  if (status === "queued") return progress.place ? `${place(progress.place)} in the queue` : "waiting for the fleet";
  if (status === "paused") return `paused at step ${progress.step} of ${progress.max_steps}`;
  if (status === "cancelled") return `cancelled at step ${progress.step} of ${progress.max_steps}`;
  if (progress.state === "reused") return "The very same had been published: nothing was trained again.";
  if (status === "succeeded") return `${count(progress.step, "step")} in ${span(progress.seconds)}`;
  const parts = [
    progress.step ? `step ${progress.step} of ${progress.max_steps}` : null,
    progress.loss === null || progress.loss === undefined ? null : `loss ${decimal(progress.loss, 3)}`,
    progress.images_per_second ? `${decimal(progress.images_per_second, 1)} images/s` : null,
    progress.together > 1 ? `in a pack of ${progress.together}` : null,
    finish ? `done ${finish > Date.now() / 1000 ? when(finish) : "in a moment"}` : null,
  ];
  return parts.filter(Boolean).join(" · ");
}

/** How much of it is done, 0 to 1. */
export function share(entry) {
  const { step, max_steps: most } = entry.progress;
  return entry.status === "succeeded" ? 1 : most ? Math.min(1, step / most) : 0;
}

function place(number) {
  if (number === 1) return "next";
  const ending = { 1: "st", 2: "nd", 3: "rd" }[number % 10] ?? "th";
  return `${number}${number % 100 > 10 && number % 100 < 14 ? "th" : ending}`;
}
