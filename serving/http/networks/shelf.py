"""Which ControlNets and IP-Adapters there are, and what a request means by them. Blocking: call it from a thread."""

import threading
import time
from collections.abc import Callable, Sequence

from serving.engine.request import NETWORK_TITLES, ControlUse, ImagePromptUse, NetworkRef
from serving.http.networks.wire import ControlBody, ImagePromptBody, NetworkInfo
from serving.http.problems import ApiError
from training.base.families import open_family
from training.base.files.folder import EMBEDDED
from training.base.files.outline import Outline
from training.storage.networks import NetworkFolders, NetworkKind, StoredNetwork
from training.storage.storage import Storage

ReadPicture = Callable[[str, str], bytes]  # what a client sent as a picture, and the field; raises ApiError
LISTS: dict[NetworkKind, str] = {"control": "/v1/controls", "ip-adapter": "/v1/ip-adapters"}


class NetworkShelf:
    """Those of a storage for one base, which clients know as `base`; up to `refresh_s` seconds old."""

    def __init__(self, storage: Storage, outline: Outline, base: str, refresh_s: float) -> None:
        self._folders = NetworkFolders(storage, EMBEDDED)
        self._family = open_family(outline.folder, outline.name)
        self._base = base
        self._refresh_s = refresh_s
        self._known: dict[tuple[NetworkKind, str], tuple[float, StoredNetwork]] = {}
        self._lock = threading.Lock()

    def all(self, kind: NetworkKind) -> list[NetworkInfo]:
        """All that there are of a kind, by name."""
        infos = []
        for name in self._folders.names(kind):
            one = self._folders.look(kind, name)
            if one is not None:
                reason = self._misfit(kind, one)
                infos.append(
                    NetworkInfo(
                        id=name, object=kind, version=one.version, bytes=one.bytes, usable=not reason, reason=reason
                    )
                )
        return infos

    def controls(self, asked: Sequence[ControlBody], read: ReadPicture, field: str = "control") -> list[ControlUse]:
        """The ControlNets of a request as the engine takes them. Raises ApiError that names the field."""
        return [self._control(one, f"{field}.{index}", read) for index, one in enumerate(asked)]

    def _control(self, asked: ControlBody, field: str, read: ReadPicture) -> ControlUse:
        if asked.start > asked.end:
            raise ApiError(
                400,
                f"'{field}.start' is {asked.start:g} and '{field}.end' is {asked.end:g}: it would end before it "
                "begins. Both are shares of the steps, from 0 to 1.",
                param=f"{field}.start",
            )
        return ControlUse(
            ref=self._ref("control", asked.model, field),
            image=read(asked.image, f"{field}.image"),
            preprocess=asked.preprocess,
            scale=asked.scale,
            start=asked.start,
            end=asked.end,
        )

    def image_prompts(self, asked: Sequence[ImagePromptBody], read: ReadPicture) -> list[ImagePromptUse]:
        """The pictures in place of words of a request as the engine takes them. Raises ApiError."""
        fields = [f"image_prompts.{index}" for index in range(len(asked))]
        return [
            ImagePromptUse(
                ref=self._ref("ip-adapter", one.model, field),
                image=read(one.image, f"{field}.image"),
                scale=one.scale,
            )
            for one, field in zip(asked, fields, strict=True)
        ]

    def _ref(self, kind: NetworkKind, name: str, field: str) -> NetworkRef:
        """The state of a name's files now. Raises ApiError if there is none, or it is for another base."""
        title, place = NETWORK_TITLES[kind], f"{field}.model"
        found = self._look(kind, name)
        if found is None:
            there = [one.id for one in self.all(kind) if one.usable]
            known = f"There are: {', '.join(there)}" if there else "There is none for this base"
            said = f"There is no {title} '{name}'. {known}; see GET {LISTS[kind]}."
            raise ApiError(400, said, param=place, code="network_not_found")
        if reason := self._misfit(kind, found):
            said = f"{title} '{name}' is for another base than '{self._base}': {reason}."
            raise ApiError(400, said, param=place, code="wrong_base")
        return NetworkRef(kind=kind, name=found.name, version=found.version)

    def _look(self, kind: NetworkKind, name: str) -> StoredNetwork | None:
        with self._lock:
            until, held = self._known.get((kind, name), (0.0, None))
        if held is not None and time.monotonic() < until:
            return held
        found = self._folders.look(kind, name)
        with self._lock:
            self._known.pop((kind, name), None)
            if found is not None:
                self._known[kind, name] = time.monotonic() + self._refresh_s, found
        return found

    def _misfit(self, kind: NetworkKind, found: StoredNetwork) -> str | None:
        """The end of a sentence on why it is not for the base; None if it is, as far as its config tells."""
        controls, prompts = self._family.controls, self._family.image_prompts
        if (controls if kind == "control" else prompts) is None:
            return f"{self._family.title} has none here"
        return controls.misfit(found.config) if kind == "control" and controls is not None else None
