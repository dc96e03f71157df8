/** A subject that is being put together: its photos as they were checked, and how it shall be trained. */

import { onceKey } from "../api/http.js";
import { createJob, deletePhotos, proposeCaptions, uploadPhotos } from "../api/training.js";
import { blankConsent, consentOf, needsConsent } from "./consent.js";
import { stem } from "./drop.js";
import { zipOf } from "./zip.js";

const drafts = []; // of this visit; photos stay in the browser until they are checked
let made = 0;

addEventListener("beforeunload", (event) => {
  if (drafts.length) event.preventDefault(); // the browser asks before photos and captions are lost
});

/** The drafts, the first first. */
export function allDrafts() {
  return drafts;
}

/** A new draft of photos {file, caption}. */
export function newDraft(folder, photos) {
  const draft = new Draft(uniqueId(folder || "subject"));
  draft.add(photos);
  drafts.push(draft);
  return draft;
}

/** One draft. `info` is the server's answer about its photos, `problem` why there is none. */
export class Draft {
  constructor(id) {
    this.key = made += 1;
    this.id = id;
    this.className = "";
    this.word = "sks";
    this.recipe = null;
    this.settings = {};
    this.consent = blankConsent();
    this.photos = [];
    this.info = null;
    this.problem = null;
    this.fresh = false; // whether the server has exactly these photos and captions
    this.once = onceKey();
  }

  /** What prompts say of it. */
  get prompt() {
    return `a photo of a ${this.word.trim()} {class}`.replace(/\s+/g, " ");
  }

  /** Adds photos {file, caption}; each gets a name that a server keeps as it is. */
  add(photos) {
    for (const { file, caption } of photos) {
      const plain =
        stem(file.name)
          .replace(/[^A-Za-z0-9-]+/g, "_")
          .replace(/^[_-]+/, "")
          .slice(0, 60) || "photo";
      const ending = (/\.[A-Za-z0-9]+$/.exec(file.name)?.[0] ?? ".jpg").toLowerCase();
      let name = plain;
      for (let turn = 2; this.photos.some((one) => stem(one.name) === name); turn += 1) name = `${plain}-${turn}`;
      this.photos.push({ name: name + ending, file, caption });
    }
    this.fresh = false;
  }

  remove(photo) {
    this.photos.splice(this.photos.indexOf(photo), 1);
    this.fresh = false;
  }

  /** Sends the photos to be checked, in place of those that were sent before. */
  async check() {
    const before = this.info?.id;
    const photos = [...this.photos];
    this.info = this.problem = null;
    this.fresh = true;
    try {
      if (photos.length) {
        const texts = photos
          .filter((one) => one.caption.trim())
          .map((one) => [`${stem(one.name)}.txt`, new Blob([one.caption.trim()])]);
        const zip = await zipOf([...photos.map((one) => [one.name, one.file]), ...texts]);
        this.info = await uploadPhotos(zip, `${this.id}.zip`);
      }
    } catch (error) {
      this.fresh = false;
      this.problem = error;
    }
    if (before) deletePhotos(before).catch(() => {});
  }

  /** Asks for captions of the photos that have none, and takes those that come: {taken, errors}. */
  async propose() {
    if (!this.fresh) await this.check();
    if (this.problem) throw this.problem;
    const bare = this.photos.filter((photo) => !photo.caption.trim() && !this.isRejected(photo));
    if (!bare.length) return { taken: 0, errors: [] };
    const found = await proposeCaptions(this.info.id, {
      names: bare.map((photo) => photo.name),
      class: this.className.trim(),
      instance_prompt: this.prompt,
    });
    let taken = 0;
    for (const { name, caption } of found) {
      const photo = bare.find((one) => one.name === name);
      if (!caption || photo.caption.trim()) continue; // somebody has written one meanwhile
      photo.caption = caption;
      this.fresh = false;
      taken += 1;
    }
    return { taken, errors: [...new Set(found.map((one) => one.error).filter(Boolean))] };
  }

  /** Whether the checks say that a photo is not used. */
  isRejected(photo) {
    return this.found.problems.some((one) => one.name === photo.name);
  }

  /** What the checks found of the photos: {problems, warnings, error}. */
  get found() {
    return this.info?.subjects[0] ?? { problems: [], warnings: [], error: null };
  }

  /** Submits it; returns the job. `rules` say who needs a consent. */
  async start(base, rules) {
    if (!this.fresh) await this.check();
    if (this.problem) throw this.problem;
    const { train, ...method } = this.settings;
    const consent = consentOf(this.consent, needsConsent(this.className, rules));
    const job = await createJob(
      {
        model: base,
        training_file: this.info.id,
        suffix: this.id,
        method: {
          type: "dreambooth_lora",
          dreambooth_lora: {
            class: this.className.trim(),
            instance_prompt: this.prompt,
            class_prompt: "a photo of a {class}",
            ...method,
          },
        },
        hyperparameters: train ?? {},
        ...(consent && { consent }),
      },
      this.once,
    );
    drafts.splice(drafts.indexOf(this), 1);
    return job;
  }

  /** Throws it away, with what was uploaded. */
  drop() {
    drafts.splice(drafts.indexOf(this), 1);
    if (this.info) deletePhotos(this.info.id).catch(() => {});
  }
}

function uniqueId(text) {
  const plain =
    text
      .toLowerCase()
      .replace(/[^a-z0-9._-]+/g, "-")
      .replace(/^[^a-z0-9]+|-+$/g, "")
      .slice(0, 50) || "subject";
  let id = plain;
  for (let turn = 2; drafts.some((one) => one.id === id); turn += 1) id = `${plain}-${turn}`;
  return id;
}
