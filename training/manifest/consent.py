"""Who needs a consent: persons, all subjects or none, as the operator says; and whom nobody may train.

A class noun says what a subject is. Minors are refused whatever the policy and whatever was agreed to. Knows no photo.
"""

import os
import re
from collections.abc import Iterable
from typing import Literal, get_args

from training.errors import UserError
from training.manifest.subject import SubjectSpec

Policy = Literal["persons", "all", "none"]
POLICY = "DREAMFLEET_REQUIRE_CONSENT"  # in the environment of what validates, trains and serves
PERSONS = frozenset(
    {
        "person", "man", "woman", "human", "people", "guy", "lady", "gentleman", "male", "female", "face", "portrait",
        "head", "selfie", "adult", "grandmother", "grandfather", "mother", "father", "husband", "wife", "bride",
        "groom", "actor", "actress", "dancer", "singer", "celebrity", "politician", "athlete", "employee", "worker",
        "soldier", "nurse", "doctor", "teacher", "student", "boyfriend", "girlfriend", "brother", "sister", "men",
        "women", "somebody",
    }
)  # fmt: skip
MINORS = frozenset(
    {
        "child", "children", "kid", "kids", "baby", "babies", "infant", "newborn", "toddler", "boy", "boys", "girl",
        "girls", "teen", "teens", "teenager", "teenagers", "minor", "minors", "schoolboy", "schoolgirl", "preteen",
        "adolescent", "youth", "daughter", "son", "underage",
    }
)  # fmt: skip


def require_consent() -> Policy:
    """The operator's policy; `persons` unless the environment says another. Raises UserError for an unknown one."""
    said = os.environ.get(POLICY, "persons")
    for policy in get_args(Policy):
        if said == policy:
            return policy
    raise UserError(f"{POLICY} is '{said}'; allowed are {', '.join(get_args(Policy))}.")


def is_person(subject: SubjectSpec) -> bool:
    """Whether its class noun, its prompts' or its own consent says that a subject is a person."""
    stated = subject.consent is not None and subject.consent.kind == "person"
    return stated or bool(_words(subject.class_ or "") & PERSONS)


def consent_problems(subject: SubjectSpec, policy: Policy, faces: bool = False) -> Iterable[str]:
    """What is wrong with a subject's consent, in words. `faces`: its photos show a face in at least half of them."""
    minors = sorted(_words(f"{subject.class_ or ''} {subject.instance_prompt}") & MINORS)
    if minors:
        yield f"'{minors[0]}' names a minor. Minors are not trained, whoever agrees."
        return
    consent = subject.consent
    if consent is None:
        why = "at least half of its photos show a face" if faces else f"class '{subject.class_}' is a person"
        if policy == "all":
            yield f"it has no `consent`, and this service trains nothing without one. {HOW}"
        elif policy == "persons" and (faces or is_person(subject)):
            yield f"it has no `consent`, and {why}. {HOW}"
        return
    if consent.expired:
        yield f"its consent has expired on {consent.expires_at}. Ask for a new one."
    if policy != "none" and (faces or _words(subject.class_ or "") & PERSONS) and consent.kind != "person":
        yield f"its consent is for a {consent.kind}, but it is a person: `kind: person` says whose leave is needed."
    if subject.public and "public" not in consent.scope:
        yield "`public: true`, but its consent lacks 'public' in its `scope`. Ask for it, or keep it private."


HOW = (
    "Add `consent: {kind: person, granted_by: NAME, scope: [train, generate], evidence: SHA256-OR-URI, granted_at: "
    "TIME}` to the subject, with what the person has agreed to (docs/consent.md)."
)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))
