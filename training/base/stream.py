"""Random streams keyed by what they are for, never by when or beside whom they are drawn."""

import hashlib

import torch


def stream(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator that depends on `seed` and `key` alone: the same on every machine, in any company."""
    text = ":".join(str(part) for part in (seed, *key))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def shuffled(seed: int, purpose: str, count: int, start: int, length: int) -> list[int]:
    """Items `start` to `start + length` of an endless walk over `count` items, reshuffled each time round."""
    picked: list[int] = []
    while len(picked) < length:
        epoch, offset = divmod(start + len(picked), count)
        order = torch.randperm(count, generator=stream(seed, purpose, "order", epoch)).tolist()
        picked += order[offset : offset + length - len(picked)]
    return picked
