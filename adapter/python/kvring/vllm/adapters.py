"""What tells a LoRA adapter's content from that of another one of the same name and path.

vLLM's keys cover an adapter's name and path, and not what is there. So its content salts the keys of its requests: not what the
files hold at some time, but what vLLM has *loaded*, which only the workers know. They read the files just before vLLM does and
just after, and tell the scheduler's side with the reports of that step; until it knows, requests of this adapter neither find nor
store anything.

vLLM goes on serving its own prefix cache whatever it loads under the name and path of before. So what has been loaded with two
contents, or with one that cannot be told, is not known any more, for as long as this vLLM lives: nothing that it computes is
stored. A worker refuses by itself what the scheduler's side has announced before it knew.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvring._logs import get_logger

from . import identity

if TYPE_CHECKING:
    from vllm.config import LoRAConfig
    from vllm.lora.request import LoRARequest

logger = get_logger("vllm.kvring.adapters")

SALT_BYTES = 16
NOT_KNOWN = b""
"""The salt of an adapter whose content nobody knows: what its requests compute is neither looked up nor stored."""

ADAPTERS_MAX = 65_536
"""Names that are remembered; those that come later are not known."""
_NOT_OF_KV = frozenset(
    {"max_loras", "max_cpu_loras", "max_lora_rank", "max_lora_cls_labels", "default_mm_loras", "specialize_active_lora"}
)
"""Of vLLM's options of adapters: all others decide what one makes of the same files."""


class Adapter(NamedTuple):
    """One that was loaded: what vLLM's keys cover, and the salt for what they do not."""

    name: str
    path: str
    salt: bytes
    why: str = ""
    """It is not known."""


class _Salts:
    """By name and path: an adapter's salt, as long as it has always been the same."""

    def __init__(self) -> None:
        self._salts: dict[tuple[str, str], bytes] = {}

    def _tell(self, adapter: Adapter) -> bool:
        """True: this is news."""
        names, salt = (adapter.name, adapter.path), adapter.salt
        if names not in self._salts and len(self._salts) >= ADAPTERS_MAX:
            return False
        before = self._salts.get(names)
        self._salts[names] = salt if before in (None, salt) else NOT_KNOWN
        return self._salts[names] != before


class Adapters(_Salts):
    """On the scheduler's side: what the workers have told."""

    def learn(self, adapter: Adapter) -> None:
        """A worker has loaded this one, or knows it no more."""
        before = len(self._salts)
        news = self._tell(adapter)
        if before < len(self._salts) == ADAPTERS_MAX:
            logger.warning(
                "this vLLM has loaded %d LoRA adapters: the KV of requests with further ones is not kept", ADAPTERS_MAX
            )
        if news and self._salts[adapter.name, adapter.path] == NOT_KNOWN:
            logger.warning(
                "the KV of requests with the LoRA adapter %s in %s is not kept while this vLLM runs: %s; load it from a folder, "
                "under another path or another name, to have it kept",
                adapter.name, adapter.path, adapter.why or "its files are not the same on all ranks",
            )  # fmt: skip

    def of(self, lora: LoRARequest | None) -> Adapter | None:
        """A request's adapter, with what its keys are salted with."""
        if lora is None:
            return None
        names = (lora.lora_name, lora.lora_path)
        return Adapter(*names, self._salts.get(names, NOT_KNOWN))


class LoadedAdapters(_Salts):
    """In a worker: what vLLM has loaded there."""

    def __init__(self) -> None:
        super().__init__()
        self._by_id: dict[int, Adapter] = {}
        self._news: list[Adapter] = []

    def watch(self) -> None:
        """From now on this is told of what vLLM loads."""
        try:
            _watch_loads()
        except Exception as error:
            logger.warning(
                "cannot see which LoRA adapters this vLLM loads (%s: %s): the KV of their requests is not kept",
                type(error).__name__, error,
            )  # fmt: skip
        _watching.add(self)

    def loaded(self, request: LoRARequest, salt: bytes, why: str) -> None:
        """vLLM has loaded the files at this request's path."""
        adapter = Adapter(request.lora_name, request.lora_path, salt, why)
        before = self._by_id.get(request.lora_int_id)
        if before is not None and before[:2] != adapter[:2]:
            # Requests that still have the id with the earlier name are computed with this one's weights.
            reused = f"its id {request.lora_int_id} was given to another adapter"
            self._report(before._replace(salt=NOT_KNOWN, why=reused))
            if not request.load_inplace:
                # And those with this name and the id may have been computed with the earlier one's, before this was loaded.
                adapter = adapter._replace(salt=NOT_KNOWN, why=f"its id {request.lora_int_id} was another adapter's")
        self._by_id[request.lora_int_id] = adapter
        self._report(adapter)

    def _report(self, adapter: Adapter) -> None:
        if self._tell(adapter):
            salt = self._salts[adapter.name, adapter.path]
            why = "" if salt else adapter.why or "its files have changed since vLLM first loaded it"
            self._news.append(adapter._replace(salt=salt, why=why))

    def holds(self, adapter: Adapter | None) -> bool:
        """Is this what has been computed with, ever since it was first loaded?"""
        return adapter is None or (adapter.salt != NOT_KNOWN and self._salts.get((adapter.name, adapter.path)) == adapter.salt)

    def take_news(self) -> list[Adapter]:
        """For the scheduler's side."""
        news, self._news = self._news, []
        return news


_watching: weakref.WeakSet[LoadedAdapters] = weakref.WeakSet()


def _watch_loads() -> None:
    """vLLM tells nobody what it loads, and when: so the method that does is made to."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    load = WorkerLoRAManager._load_adapter
    if hasattr(load, "tells_kvring"):
        return

    @functools.wraps(load)
    def load_adapter(manager: WorkerLoRAManager, request: LoRARequest) -> object:
        before, _ = _salt(request, manager.lora_config)
        adapter = load(manager, request)
        after, why = _salt(request, manager.lora_config)
        if before != after:
            after, why = NOT_KNOWN, "its files have changed while vLLM loaded it"
        for one in list(_watching):
            one.loaded(request, after, why)
        return adapter

    load_adapter.tells_kvring = True  # type: ignore[attr-defined]
    WorkerLoRAManager._load_adapter = load_adapter


def _salt(request: LoRARequest, config: LoRAConfig) -> tuple[bytes, str]:
    """Of the files that are there now; or why there is none. A repository is fetched by vLLM, whichever commit it has then."""
    try:
        folder = Path(request.lora_path).expanduser()
        options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        deciding = {name: value for name, value in options.items() if name not in _NOT_OF_KV}
        known = identity.plain([identity.adapter(folder), request.is_3d_lora_weight, deciding])
    except Exception as error:
        return NOT_KNOWN, f"its files cannot be told ({error})"
    return hashlib.sha256(known.encode()).digest()[:SALT_BYTES], ""


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
