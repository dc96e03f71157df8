/** The buttons of a subject in training: pause, resume, cancel, retry. */

import { ask } from "../api/training.js";
import { h } from "../frame/dom.js";
import { confirmed } from "../frame/dialog.js";
import { tell } from "../frame/notice.js";

/** The buttons that make sense now; `changed` is called when the server has done what was asked. */
export function controls(entry, changed) {
  const { status, kind } = entry;
  const verbs = [];
  if (kind === "job" && ["queued", "running"].includes(status)) verbs.push("pause");
  if (status === "paused") verbs.push("resume");
  if (!entry.ended) verbs.push("cancel");
  if (["failed", "cancelled"].includes(status)) verbs.push("retry");
  return verbs.map((verb) => button(entry, verb, changed));
}

function button(entry, verb, changed) {
  const whole = entry.kind === "run";
  const text = verb[0].toUpperCase() + verb.slice(1) + (whole ? ` the run ${entry.group}` : "");
  const act = async (event) => {
    const pressed = event.currentTarget;
    if (
      verb === "cancel" &&
      !(await confirmed(
        `Cancel ${whole ? `the run ${entry.group}` : entry.id}?`,
        whole
          ? "All its subjects that have not ended stop for good."
          : "It stops for good; what is published stays. To stop for a while, pause it.",
        "Cancel it",
      ))
    )
      return;
    pressed.disabled = true;
    try {
      await ask(entry.control, verb);
      await changed();
    } catch (error) {
      tell(error);
      pressed.disabled = false;
    }
  };
  return h(
    "button",
    {
      class: `button small ${verb === "cancel" ? "quiet danger" : ""}`,
      type: "button",
      "aria-label": whole ? text : `${text} ${entry.id}`,
      onclick: act,
    },
    text,
  );
}
