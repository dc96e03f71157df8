"""Who needs a consent, by class noun and policy; and whom nobody trains."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.training.subjects import spec
from training.errors import UserError
from training.manifest.consent import POLICY, Policy, consent_problems, require_consent
from training.photos.intake import fingerprint

NOW = datetime.now(UTC)
GIVEN = {"kind": "person", "granted_by": "Ann", "evidence": "https://example.org/1", "granted_at": NOW.isoformat()}


def problems(policy: Policy, *, faces: bool = False, **settings: Any) -> list[str]:
    return list(consent_problems(spec("s", **settings), policy, faces))


def as_settings(class_: str, consent: dict[str, Any] | None) -> dict[str, Any]:
    return {"class": class_, "consent": consent}


@pytest.mark.parametrize(
    ("policy", "class_", "consent", "said"),
    [
        ("persons", "dog", None, None),
        ("persons", "woman", None, "class 'woman' is a person"),
        ("persons", "old man", None, "is a person"),
        ("persons", "woman", GIVEN, None),
        ("persons", "woman", {**GIVEN, "kind": "pet"}, "but it is a person"),
        ("all", "dog", None, "trains nothing without one"),
        ("all", "dog", {**GIVEN, "kind": "pet"}, None),
        ("none", "woman", None, None),
        ("none", "child", GIVEN, "names a minor"),
        ("persons", "little girl", GIVEN, "names a minor"),
    ],
)
def test_the_policy_decides_who_needs_a_consent(
    policy: Policy, class_: str, consent: dict[str, Any] | None, said: str | None
) -> None:
    found = problems(policy, **as_settings(class_, consent))
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


def test_faces_make_a_person() -> None:
    (found,) = problems("persons", faces=True, **as_settings("thing", None))
    assert "show a face" in found
    assert problems("none", faces=True, **as_settings("thing", None)) == []


def test_expired_consents_and_public_adapters_without_leave_are_refused() -> None:
    over = {**GIVEN, "granted_at": (NOW - timedelta(9)).isoformat(), "expires_at": (NOW - timedelta(1)).isoformat()}
    assert "has expired" in problems("persons", **as_settings("woman", over))[0]
    assert "lacks 'public'" in problems("persons", public=True, **as_settings("woman", GIVEN))[0]
    leave = {**GIVEN, "scope": ["train", "generate", "public"]}
    assert problems("persons", public=True, **as_settings("woman", leave)) == []


def test_the_operator_sets_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(POLICY, raising=False)
    assert require_consent() == "persons"
    monkeypatch.setenv(POLICY, "all")
    assert require_consent() == "all"
    monkeypatch.setenv(POLICY, "some")
    with pytest.raises(UserError, match="'some'; allowed are persons, all, none"):
        require_consent()


def test_a_consent_is_no_part_of_what_is_learned() -> None:
    plain, agreed = spec("s"), spec("s", consent=GIVEN)
    assert fingerprint(plain, "0" * 64, []) == fingerprint(agreed, "0" * 64, [])
