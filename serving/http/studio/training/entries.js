/** Subjects in training, whether they came as a job or in a run: one shape for both. */

import { get, path } from "../api/http.js";
import { listJobs, listRuns, listSubjects } from "../api/training.js";
import { link } from "../frame/router.js";

const JOBS = 60;
const RUNS = 20;
const ENDED = new Set(["succeeded", "failed", "cancelled"]);
const kept = new Map(); // subjects of runs that have ended: they do not change

/**
 * All subjects, the latest first: {kind, run, id, status, adapter, version, error, finish, created, progress, base,
 * control, page, ended, group}. `base` is its path in the API, `control` that of what can be cancelled, and `group`
 * the name of its run.
 */
export async function listEntries(options) {
  const [jobs, runs] = await Promise.all([listJobs(JOBS, options), listRuns(RUNS, options)]);
  const ofRuns = await Promise.all(runs.map((run) => subjectsOf(run, options)));
  return [...jobs.map(ofJob), ...ofRuns.flat()].sort((a, b) => b.created - a.created);
}

/** One subject by the parts of its address: job/<id>, or run/<run>/<subject>. */
export async function showEntry([kind, run, id], options) {
  if (kind === "job") return ofJob(await get(path("v1", "fine_tuning", "jobs", run), options));
  const [about, subject] = await Promise.all([
    get(path("v1", "runs", run), options),
    get(path("v1", "runs", run, "subjects", id), options),
  ]);
  return ofSubject(subject, about);
}

async function subjectsOf(run, options) {
  if (!kept.has(run.id) || run.status === "running")
    kept.set(
      run.id,
      listSubjects(run.id, options).catch((error) => {
        kept.delete(run.id);
        throw error;
      }),
    );
  return (await kept.get(run.id)).map((subject) => ofSubject(subject, run));
}

function ofJob(job) {
  const base = path("v1", "fine_tuning", "jobs", job.id);
  return {
    ...shared(job),
    kind: "job",
    run: job.id,
    id: job.suffix,
    created: job.created_at,
    base,
    control: base,
    group: null,
    settings: job.method?.dreambooth_lora ?? null,
    page: link(["training", "job", job.id]),
  };
}

function ofSubject(subject, run) {
  return {
    ...shared(subject),
    kind: "run",
    run: run.id,
    id: subject.id,
    created: run.created_at,
    base: path("v1", "runs", run.id, "subjects", subject.id),
    control: path("v1", "runs", run.id),
    group: run.name,
    settings: null,
    page: link(["training", "run", run.id, subject.id]),
  };
}

function shared({ status, adapter, version, error, estimated_finish: finish, progress }) {
  return { status, adapter, version, error, finish, progress, ended: ENDED.has(status) };
}
