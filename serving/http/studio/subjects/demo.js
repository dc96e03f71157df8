/** The demo's subjects, trained by one click. */

import { createDemo } from "../api/training.js";
import { h } from "../frame/dom.js";
import { notify, tell } from "../frame/notice.js";
import { go, refresh } from "../frame/router.js";

/** The button; null where the server's base is not the one that the demo is drawn for. */
export function demoButton(base, kind = "") {
  if (base !== "pocket") return null;
  const start = async () => {
    button.disabled = true;
    try {
      await createDemo();
      notify("Six subjects are in the queue. They train together.");
      if (location.hash === "#/training") refresh();
      else go("#/training");
    } catch (error) {
      tell(error);
      button.disabled = false;
    }
  };
  const button = h("button", { class: `button ${kind}`, type: "button", onclick: start }, "Train the demo's subjects");
  return button;
}
