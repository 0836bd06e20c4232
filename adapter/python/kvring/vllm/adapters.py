"""What tells a LoRA adapter's content from that of another one of the same name.

vLLM's keys cover an adapter's name and path, and not what is there. So its content salts the keys of its requests. It is read by
threads of our own, for a mount that hangs must not hang vLLM's scheduler; until it is known, its requests neither find nor store
anything.

vLLM itself loads an adapter's files when it first needs them, and again when it has had no room for it meanwhile; whoever changes
them in place without loading them under another id gets either content from it. That is noticed here (they are read again now
and then, while requests come), and from then on nothing that this adapter computes is stored.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvring._logs import get_logger

from . import identity

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = get_logger("vllm.kvring.adapters")

SALT_BYTES = 16
NOT_KNOWN = b""
"""The salt of an adapter whose content nobody knows: what its requests compute is neither looked up nor stored."""

_ADAPTERS_MAX = 1024
_READERS_MAX = 8
"""At once, those that a mount does not answer among them."""
_READ_AGAIN_S = 10.0


@dataclass(slots=True)
class _Adapter:
    """One that has been asked for."""

    content: str | None = None
    salt: bytes = NOT_KNOWN
    changed: bool = False
    reading: bool = False
    read_at: float = -math.inf


class Adapters:
    """The salts of LoRA adapters. The scheduler's thread asks for them, and never waits."""

    def __init__(self, read_again_s: float = _READ_AGAIN_S) -> None:
        self._adapters: OrderedDict[tuple[str, int, str, bool], _Adapter] = OrderedDict()
        self._read_again_s = read_again_s
        self._readers = 0
        self._lock = threading.Lock()
        self._nowhere = os.urandom(SALT_BYTES).hex()

    def salt(self, lora: LoRARequest | None) -> bytes | None:
        """Of a request's keys; `None` without an adapter, `NOT_KNOWN` where nobody knows its content (yet)."""
        if lora is None:
            return None
        if lora.load_inplace:
            # vLLM loads it anew with each step that uses it.
            return NOT_KNOWN
        name = (lora.lora_name, lora.lora_int_id, lora.lora_path, lora.is_3d_lora_weight)
        with self._lock:
            adapter = self._adapters.setdefault(name, _Adapter())
            self._adapters.move_to_end(name)
            if len(self._adapters) > _ADAPTERS_MAX:
                self._adapters.popitem(last=False)
            due = not adapter.changed and time.monotonic() - adapter.read_at >= self._read_again_s
            if due and not adapter.reading and self._readers < _READERS_MAX:
                threading.Thread(target=self._read, args=(name, adapter), name="kvring-adapter", daemon=True).start()
                adapter.reading = True
                self._readers += 1
            return adapter.salt

    def _read(self, name: tuple[str, int, str, bool], adapter: _Adapter) -> None:
        try:
            found = identity.adapter(Path(name[2]).expanduser())
        except Exception:
            # Not here, or not here any more.
            found = None
        with self._lock:
            self._readers -= 1
            adapter.reading, adapter.read_at = False, time.monotonic()
            if found is None and adapter.content is None:
                # A repository, or what cannot be read: this vLLM knows which one it is, and no other does.
                adapter.salt = _salt("instance", self._nowhere, *name)
            elif adapter.content is None:
                adapter.content, adapter.salt = found, _salt("content", found, name[3])
            elif found not in (None, adapter.content):
                adapter.changed, adapter.salt = True, NOT_KNOWN
        if adapter.changed:
            logger.warning(
                "the files of the LoRA adapter %s in %s have changed since vLLM began to use it, so its KV is not kept "
                "any more; load it again, under another id, to have it kept",
                name[0], name[2],
            )  # fmt: skip


def _salt(*known: object) -> bytes:
    return hashlib.sha256(identity.plain(known).encode()).digest()[:SALT_BYTES]


def salted(key: bytes, salt: bytes | None) -> bytes:
    """The key that is looked up and stored: keys are digests, so a fixed difference keeps them apart from all others."""
    if salt is None:
        return key[:SALT_BYTES]
    return (int.from_bytes(key[:SALT_BYTES], "little") ^ int.from_bytes(salt, "little")).to_bytes(SALT_BYTES, "little")


def joined(first: bytes | None, second: bytes | None) -> bytes | None:
    """Both salts in one."""
    if first is None or second is None:
        return first or second
    return hashlib.sha256(first + second).digest()[:SALT_BYTES]
