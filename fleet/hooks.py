"""Webhooks: who submitted a subject is told how it ended, at least once, signed as Standard Webhooks says.

    fleet/hooks/<id>.json       a message that has not been taken yet

A message is on the storage before its run counts as ended, and is tried again with growing delays, also by the next
driver. The body is the object that GET shows at that moment.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
from pydantic import Field

from fleet.board import Board
from fleet.showing import job_info, run_subject, status_of
from serving.http.problems import ApiError
from training.run.accepted import Order
from training.run.run import RunRecord, SubjectRecord
from training.storage.closed import Closed
from training.storage.interface import NotFound, Storage, StorageError

DELAYS_S = (5.0, 30.0, 120.0, 300.0, 900.0, 1800.0, 3600.0)  # after so many failures; then the message is given up
TIMEOUT_S = 15.0
_ROOT = "fleet/hooks"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
log = logging.getLogger(__name__)


class Message(Closed):
    """What is to be told: of which subject, and how often that has failed. `due` in seconds since the epoch."""

    id: str
    event: str
    tenant: str
    run: str
    kind: str
    subject: str
    created: float = Field(default_factory=time.time)
    failures: int = 0
    due: float = 0.0


class BadHook(Exception):
    """A URL that messages must not go to; the message says why."""


class Hooks:
    """The messages of one storage. `private`: they may go to loopback and private addresses."""

    def __init__(self, storage: Storage, board: Board, private: bool, now: Callable[[], float] = time.time) -> None:
        self._storage = storage
        self._board = board
        self._private = private
        self._now = now

    def ended(self, order: Order, record: RunRecord, subject: SubjectRecord) -> None:
        """A subject has ended: if somebody wants to know, the message is on the storage. May be called twice."""
        event = f"fine_tuning.job.{status_of(subject)}"
        if order.hook is None or (order.hook.events and event not in order.hook.events):
            return
        # named by the end itself: a second call makes no second message
        end = f"{order.run}/{subject.id}/{subject.state}/{subject.version}/{len(subject.attempts)}/{subject.updated}"
        id = f"msg_{hashlib.sha256(end.encode()).hexdigest()[:32]}"
        message = Message(
            id=id, event=event, tenant=order.tenant, run=order.run, kind=order.kind, subject=subject.id, due=self._now()
        )
        self._storage.create(f"{_ROOT}/{id}.json", message.model_dump_json().encode())

    def deliver(self, stopped: threading.Event, every_s: float = 0.5) -> None:
        """Sends what is due until `stopped`. For one thread of the process that leads."""
        waiting: dict[str, Message] = {}
        while not stopped.wait(every_s):
            try:
                keys = self._storage.list(_ROOT)
                for key in keys:
                    if key not in waiting:
                        waiting[key] = Message.model_validate_json(self._storage.get(key))
                for key in [key for key in waiting if key not in keys]:
                    del waiting[key]
                for key, message in list(waiting.items()):
                    if message.due <= self._now() and not stopped.is_set():
                        waiting[key] = self._try(key, message)
            except NotFound:
                continue
            except StorageError as error:
                log.warning("webhooks wait for the storage: %s", error)

    def _try(self, key: str, message: Message) -> Message:
        """Sends a message once; it is deleted, or written down with the time of the next try."""
        try:
            self._send(message)
        except ApiError:  # its run is gone
            self._storage.delete(key)
            return message
        except (httpx.HTTPError, BadHook, OSError, ValueError) as error:
            failures = message.failures + 1
            log.info("webhook %s of run %s: try %d failed: %s", message.id, message.run, failures, error)
            if failures > len(DELAYS_S):
                self._storage.delete(key)
                return message
            due = self._now() + DELAYS_S[failures - 1]
            message = message.model_copy(update={"failures": failures, "due": due})
            self._storage.put(key, message.model_dump_json().encode())
            return message
        self._storage.delete(key)
        return message

    def _send(self, message: Message) -> None:
        """Raises HTTPError unless it is taken, BadHook for an address that is not allowed."""
        look = self._board.look(message.tenant, message.run, "job" if message.kind == "job" else "run")
        hook = look.order.hook
        if hook is None:
            return
        standing = self._board.standing()
        shown = job_info(look, standing) if message.kind == "job" else None
        body = (shown or run_subject(look, look.subject(message.subject), standing)).model_dump_json().encode()
        url, host, address = reach(hook.url, self._private)
        stamp = str(int(self._now()))
        headers = {
            "Content-Type": "application/json",
            "Host": host,
            "webhook-id": message.id,
            "webhook-timestamp": stamp,
            "webhook-signature": sign(hook.secret, message.id, stamp, body),
            "webhook-event": message.event,
        }
        extensions = {"sni_hostname": urlsplit(url).hostname}
        with httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client:
            answer = client.post(address, content=body, headers=headers, extensions=extensions)
        if answer.status_code == 410:  # it wants no more
            return
        if not answer.is_success:
            raise httpx.HTTPError(f"it answered {answer.status_code}")


def sign(secret: str, id: str, stamp: str, body: bytes) -> str:
    """The signature of a message: HMAC-SHA256 over `<id>.<timestamp>.<body>`, base64, with the scheme's version."""
    key = secret.encode()
    if secret.startswith("whsec_"):
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            key = secret.encode()
    digest = hmac.new(key, f"{id}.{stamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def reach(url: str, private: bool) -> tuple[str, str, str]:
    """A URL, its Host header, and the same URL by address, as it was resolved now: a name that changes its mind later
    leads nowhere else. Raises BadHook for addresses that are not public, unless `private`."""
    parts = urlsplit(url)
    if parts.hostname is None or parts.scheme not in ("http", "https"):
        raise BadHook(f"'{url}' is no http or https URL")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [str(one[4][0]) for one in found]
    if not private and not all(_is_public(address) for address in addresses):
        raise BadHook(f"'{parts.hostname}' is a private address; webhooks go to public ones")
    name = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    return url, parts.netloc.rpartition("@")[2], parts._replace(netloc=f"{name}:{port}").geturl()


def check_hook(url: str, private: bool) -> None:
    """Raises ApiError for a webhook that leads, as far as can be seen without asking anybody, to a private address."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
        refused = not private and (host == "localhost" or host.endswith(".localhost") or not _may_be_public(host))
    except ValueError:
        refused, host = True, url[:100]
    if not host or refused:
        raise ApiError(
            400,
            f"Webhook '{url[:100]}': webhooks go to public addresses. The operator may allow others: --private-hooks.",
            param="webhook.url",
        )


def _may_be_public(host: str) -> bool:
    try:
        return _is_public(str(ipaddress.ip_address(host)))
    except ValueError:
        return True  # a name


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64 or ip.sixtofour is not None or ip.teredo is not None:
            return False
    return ip.is_global and not ip.is_multicast
