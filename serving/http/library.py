"""The adapters as clients see them: resolved, listed, uploaded and deleted, always on behalf of a tenant.

An adapter that a tenant may not see does not exist for it: another's adapter and a missing one give the same error. For
one base. Every call blocks, so an event loop calls it from a thread. Knows nothing about HTTP or the engine.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from serving.config import MAX_RANK, EngineSpec, Limits
from serving.engine.request import AdapterRef
from serving.engine.tiers.fit import check_fit
from serving.errors import QuotaExceeded, Refused
from serving.flags import flag
from serving.http.known import Known
from serving.http.networks.shelf import NetworkShelf
from training.adapters.adapter import Adapter, AdapterError, check_adapter, load_adapter, save_adapter
from training.adapters.formats.formats import import_adapter
from training.base.families import open_family
from training.base.files.folder import hash_base, public_name
from training.base.files.outline import Outline
from training.storage.card import Card
from training.storage.consents import Revoked, check_unrevoked
from training.storage.registry import WEIGHTS, CorruptAdapter, Registry, StoredUsage
from training.storage.storage import content_id
from training.storage.version import Resolved, UnknownAdapter, check_id

USAGE_S = 10.0  # how old the count of a tenant's stored bytes may be


class Library:
    """The registry's adapters for one base. What `current` says may be `refresh_s` old.

    `serves` are hashes, or their beginnings, of other bases whose adapters are for this one, too, beside those that the
    base names itself.
    Clients see the base's name without the path that it may have on this machine.
    """

    def __init__(
        self, registry: Registry, outline: Outline, *, refresh_s: float = 1.0, serves: Sequence[str] = ()
    ) -> None:
        self.registry = registry
        self.outline = outline
        self.base = public_name(outline.name)
        self.base_hash = hash_base(outline.folder)
        self._serves = (*outline.facts.serves, *serves)
        self._fits: dict[str, str | None] = {}  # by version, of adapters of other bases: why it does not fit
        self.known = Known(registry, refresh_s)
        self.networks = NetworkShelf(registry.storage, outline, self.base, refresh_s)
        self._usage: dict[str, tuple[float, StoredUsage]] = {}
        self._uploads: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self.withheld: frozenset[str] = frozenset()  # `tenant/id` that may not be served

    def resolve(self, tenant: str, name: str) -> Resolved:
        """The version that `id`, `tenant/id` or either with `@version` means to `tenant` now.

        Raises UnknownAdapter, CorruptAdapter; Refused for an adapter of another base, unless it is served and fits."""
        path, _, version = name.partition("@")
        owner, slash, id = path.partition("/")
        owner, id = (owner, id) if slash else (tenant, path)
        try:
            resolved = self.known.look(f"{owner}/{id}", version or None)
        except CorruptAdapter:
            if owner != tenant:  # without a readable card nobody knows whether it is public
                raise unknown(name) from None
            raise
        if owner == tenant and f"{owner}/{id}" in self.withheld:
            raise Revoked(f"Adapter '{name}' is withdrawn: consent was taken back, or the operator took it off.")
        if resolved is None or (resolved.tenant != tenant and not resolved.public):
            raise unknown(name)
        if problem := self._misfit(resolved):
            theirs, ours = _base(resolved.card.base, resolved.card.family), _base(self.base, self.outline.facts.title)
            raise Refused(f"Adapter '{name}' was made for another base ({theirs}); this server has {ours}{problem}")
        return resolved

    def _misfit(self, resolved: Resolved) -> str | None:
        """The end of a sentence on why an adapter of another base is not served here; None if it is."""
        if (made_for := resolved.card.base_hash) == self.base_hash:
            return None
        if not made_for.startswith(self._serves):
            return f". If it fits, start the server with {flag('serves')} {made_for[:12]}."
        if resolved.version not in self._fits:
            try:
                check_adapter(load_adapter(self.registry.weights(resolved)), self.shapes(), MAX_RANK)
                self._fits[resolved.version] = None
            except AdapterError as error:
                self._fits[resolved.version] = f", which serves that one's adapters, but it does not fit: {error}"
        return self._fits[resolved.version]

    def page(self, tenant: str, after: str | None = None, limit: int | None = None) -> tuple[list[Resolved], bool]:
        """At most `limit` adapters for this base that follow `after`, and whether there are more.

        The tenant's own come first, by id, then public ones. Reads two listings and the cards of this page. Passes over
        damaged adapters, which the log and `known.damaged` tell.
        """
        names = [f"{tenant}/{id}" for id in self.registry.ids(tenant)]
        names += [name for name in self.registry.public_names() if not name.startswith(f"{tenant}/")]
        if after is not None:
            last = _place(after if "/" in after else f"{tenant}/{after}", tenant)
            names = [name for name in names if _place(name, tenant) > last]
        found: list[Resolved] = []
        for name in names:
            resolved = self._listed(name, tenant)
            if resolved is None:
                continue
            if len(found) == limit:
                return found, True
            found.append(resolved)
        return found, False

    def upload(
        self,
        tenant: str,
        id: str,
        data: bytes,
        spec: EngineSpec,
        *,
        public: bool | None = None,
        trigger: str = "",
        limits: Limits | None = None,
        sources: tuple[str, ...] = (),
    ) -> Resolved:
        """Checks an adapter file against the base, publishes it as the tenant's `id` and returns its version.

        `public` None leaves the visibility of an existing adapter; a new one is private. `sources` are the versions
        that it was merged from. Raises AdapterError saying which modules or values are wrong, QuotaExceeded if
        `limits` allow no more, Revoked for an id that was taken back; then nothing has been stored.
        """
        check_id(id)
        check_unrevoked(self.registry.storage, tenant, id, ())
        shapes = self.shapes()
        adapter = import_adapter({"adapter.safetensors": data}, shapes, self.outline.names)
        check_fit(adapter, spec, self.outline.facts)
        check_adapter(adapter, shapes, spec.rank)
        self._check_words(adapter)
        weights = save_adapter(adapter)
        card = self._card(adapter, weights, trigger).model_copy(update={"sources": sources})
        with self._lock:
            mine = self._uploads[tenant]
        with mine:  # one at a time: each counts what those before have stored
            if limits is not None:
                self._check_room(tenant, id, len(weights), limits)
            if public is False:  # first, so that the new version is not public even for a moment
                with suppress(UnknownAdapter):
                    self.registry.describe(tenant, id, public=False)
            published = self.registry.publish(tenant, id, weights, card)
            if not published.new:  # the same file was published before: the tenant wants it served again
                self.registry.set_current(tenant, id, published.version)
            self.registry.describe(tenant, id, public=public, trigger=trigger or None)
            self._forget(tenant, id)
        return self.registry.resolve(f"{tenant}/{id}", published.version)

    def _card(self, adapter: Adapter, weights: bytes, trigger: str) -> Card:
        return Card.model_validate(
            {
                "sha256": content_id(weights),
                "size": len(weights),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "fingerprint": content_id(weights),
                "base": self.base,
                "base_hash": self.base_hash,
                "family": self.outline.facts.title,
                "rank": adapter.rank,
                "alpha": adapter.rank,  # any scale of the file is folded in
                "targets": _ends(adapter, self.outline.facts.denoiser),
                "text_encoder_targets": _ends(adapter, *self.outline.facts.text_encoders),
                "instance_prompt": trigger,
                "class": "",
                "trigger": trigger,
            }
        )

    def change(
        self,
        tenant: str,
        id: str,
        *,
        public: bool | None = None,
        trigger: str | None = None,
        version: str | None = None,
    ) -> Resolved:
        """Changes who may see the tenant's adapter, its trigger or the served version. Raises UnknownAdapter."""
        self.resolve(tenant, check_id(id))
        if version is not None:
            self.registry.set_current(tenant, id, version)
        self.registry.describe(tenant, id, public=public, trigger=trigger)
        self._forget(tenant, id)
        return self.resolve(tenant, id)

    def versions(self, tenant: str, id: str) -> list[Resolved]:
        """All versions of the tenant's adapter that can be read, newest first. Raises UnknownAdapter."""
        self.resolve(tenant, check_id(id))
        found = [self._listed(f"{tenant}/{id}", tenant, version) for version in self.registry.versions(tenant, id)]
        return sorted((one for one in found if one is not None), key=lambda one: one.card.created, reverse=True)

    def files(self, tenant: str, id: str, version: str) -> tuple[Resolved, dict[str, int]]:
        """A version of the tenant's adapter, and the bytes of each of its files."""
        resolved = self.resolve(tenant, f"{check_id(id)}@{version}")
        return resolved, self.registry.sizes(resolved)

    def read(self, tenant: str, id: str, version: str, file: str) -> bytes:
        """One file of a version of the tenant's adapter. Raises UnknownAdapter, CorruptAdapter."""
        resolved, files = self.files(tenant, id, version)
        if file not in files:
            raise UnknownAdapter(
                f"Version {resolved.version[:12]} of '{id}' has no such file. It has {', '.join(files)}."
            )
        return self.registry.weights(resolved) if file == WEIGHTS else self.registry.read(resolved, file)

    def remove_version(self, tenant: str, id: str, version: str) -> AdapterRef:
        """Removes one version of the tenant's adapter. Raises UnknownAdapter, CurrentVersion."""
        gone = self.registry.remove_version(tenant, id, version)
        self._forget(tenant, id)
        return AdapterRef(tenant=tenant, id=id, version=gone)

    def delete(self, tenant: str, id: str) -> Resolved | None:
        """Deletes the tenant's own adapter and returns what was current, if it can be read. Raises UnknownAdapter."""
        try:
            resolved = self.registry.look(f"{tenant}/{check_id(id)}")
        except CorruptAdapter:
            resolved = None
        try:
            self.registry.delete(tenant, id)
        except UnknownAdapter:
            raise unknown(id) from None
        self._forget(tenant, id)
        return resolved

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and weight shape of every layer of the base that an adapter may change."""
        return self.outline.shapes

    def count_tokens(self, text: str) -> int:
        """How many tokens of the base's tokenizer `text` has, without its begin and end."""
        tokenizer = self.load_tokenizer()
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else 0

    def load_tokenizer(self) -> Any:
        """The base's tokenizer; the first call takes a moment."""
        if self._tokenizer is None:
            self._tokenizer = open_family(self.outline.folder, self.base).tokenizer()
        return self._tokenizer

    def _check_words(self, adapter: Adapter) -> None:
        width = self.outline.facts.word_width
        if any(vectors.shape[-1] != width for vectors in adapter.embeddings.values()):
            raise AdapterError(f"The words {', '.join(adapter.embeddings)} need vectors of width {width} on this base.")

    def _check_room(self, tenant: str, id: str, size: int, limits: Limits) -> None:
        now = time.monotonic()
        expires, usage = self._usage.get(tenant, (0.0, StoredUsage(0, 0)))
        if now >= expires:
            usage = self.registry.usage(tenant)
            self._usage[tenant] = now + USAGE_S, usage
        if usage.bytes + size > limits.tenant_bytes:
            raise QuotaExceeded(
                f"Your adapters take {usage.bytes} bytes, this one {size}; at most {limits.tenant_bytes} are allowed. "
                "Delete adapters or old versions."
            )
        if usage.adapters >= limits.tenant_adapters and self.registry.look(f"{tenant}/{id}") is None:
            raise QuotaExceeded(
                f"You have {usage.adapters} adapters; at most {limits.tenant_adapters} are allowed. Delete one, or "
                "upload this as a new version of one."
            )

    def _listed(self, name: str, tenant: str, version: str | None = None) -> Resolved | None:
        """The version that `name` means, if a list of `tenant` may show it; else None."""
        try:
            resolved = self.known.look(name, version)
        except CorruptAdapter:
            return None
        if resolved is None or not (resolved.tenant == tenant or resolved.public):
            return None
        return resolved if resolved.card.base_hash.startswith((self.base_hash, *self._serves)) else None

    def _forget(self, tenant: str, id: str) -> None:
        self._usage.pop(tenant, None)
        self.known.forget(tenant, id)

    def list(self, tenant: str) -> list[Resolved]:
        """All of `page`."""
        return self.page(tenant)[0]


def unknown(name: str) -> UnknownAdapter:
    """The one error for what is missing and for what is another's."""
    return UnknownAdapter(f"Unknown adapter '{name}'. See GET /v1/adapters for yours.")


def _base(name: str, family: str) -> str:
    return f"'{name}', {family}" if family else f"'{name}'"


def _place(name: str, tenant: str) -> tuple[bool, str]:
    """The sort key of `tenant/id` in a list of `tenant`: its own come first."""
    return not name.startswith(f"{tenant}/"), name


def _ends(adapter: Adapter, *components: str) -> tuple[str, ...]:
    """The last parts of the names of some components' modules, each once: `to_q`, `to_out.0`."""
    names = (name.split(".") for name in adapter.modules if name.partition(".")[0] in components)
    return tuple(sorted({".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1] for parts in names}))
