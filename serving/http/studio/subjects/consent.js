/** Who allowed the use of a subject's photos: asked of persons, or of everything where the operator says so. */

import { h } from "../frame/dom.js";
import { choice, field } from "../frame/fields.js";

const SCOPES = [
  ["train", "Train on the photos"],
  ["generate", "Draw pictures"],
  ["public", "Share with other tenants"],
];

/** Whether a subject of this class needs a consent. `rules`: {policy, persons} of the server. */
export function needsConsent(className, rules) {
  if (rules.policy !== "persons") return rules.policy === "all";
  return isPerson(className, rules);
}

/** Whether a class noun says that a subject is a person. */
export function isPerson(className, { persons }) {
  return (className.toLowerCase().match(/[a-z]+/g) ?? []).some((word) => persons.includes(word));
}

/** What is sent of a draft's consent; null where none is needed and nobody has begun to say one. */
export function consentOf(given, needed) {
  if (!needed && !given.granted_by.trim() && !given.evidence.trim()) return null;
  return {
    kind: given.kind,
    granted_by: given.granted_by.trim(),
    scope: given.scope,
    evidence: given.evidence.trim(),
    granted_at: dayStart(given.granted_on),
    ...(given.expires_on && { expires_at: dayStart(given.expires_on) }),
  };
}

/** A consent of which nothing is known yet. */
export function blankConsent() {
  return {
    kind: "person",
    granted_by: "",
    scope: ["train", "generate"],
    evidence: "",
    granted_on: new Date().toISOString().slice(0, 10),
    expires_on: "",
  };
}

/** The fields; they change `draft.consent`. `show(needed)` opens them and makes the browser ask for what is missing. */
export function consentFields(draft) {
  const given = draft.consent;
  const text = (name, more) =>
    h("input", { value: given[name], oninput: (event) => (given[name] = event.target.value), ...more });
  const who = text("granted_by", { maxlength: 200 });
  const evidence = text("evidence", { maxlength: 510, spellcheck: "false", placeholder: "SHA-256 or URI" });
  const since = text("granted_on", { type: "date" });
  const until = text("expires_on", { type: "date" });
  const scopes = SCOPES.map(([scope, words]) =>
    h(
      "label",
      { class: "check" },
      h("input", {
        type: "checkbox",
        checked: given.scope.includes(scope),
        onchange: (event) => {
          const kept = given.scope.filter((one) => one !== scope);
          given.scope = event.target.checked ? [...kept, scope] : kept;
        },
      }),
      words,
    ),
  );
  const title = h("summary", {}, "Consent");
  const node = h(
    "details",
    { class: "more consent" },
    title,
    h(
      "div",
      {},
      h(
        "div",
        { class: "fields" },
        field("Who agreed", who, "The person, or who may speak for it."),
        field(
          "Of a",
          choice(["person", "pet", "object"], given.kind, (value) => (given.kind = value)),
        ),
        field("Evidence", evidence, "Of the agreement: the SHA-256 of a document, or a URI."),
        field("Given on", since),
        field("Ends on", until, "Empty: not at all."),
      ),
      h("fieldset", { class: "row" }, h("legend", {}, "Agreed to"), scopes),
      globalThis.crypto?.subtle && h("div", { class: "row" }, hashButton(evidence, given)),
    ),
  );
  const show = (needed) => {
    title.textContent = needed ? "Consent: needed to train this subject" : "Consent";
    if (needed) node.open = true;
    for (const control of [who, evidence, since]) control.required = needed;
  };
  return { node, show };
}

/** Fills the evidence with the hash of a file, which stays on this machine. */
function hashButton(evidence, given) {
  const file = h("input", {
    type: "file",
    class: "sr",
    "aria-label": "Document of the agreement",
    onchange: async () => {
      if (!file.files.length) return;
      const digest = await crypto.subtle.digest("SHA-256", await file.files[0].arrayBuffer());
      given.evidence = [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
      evidence.value = given.evidence;
    },
  });
  return h("label", { class: "button small" }, "Hash a document (it is not sent)", file);
}

function dayStart(day) {
  return day ? `${day}T00:00:00Z` : "";
}
