"""Tells LoRA adapters apart that have the same name and path but different content.

vLLM's keys cover an adapter's name and path, but not its content. So a digest of the content salts the keys of its requests: not
of what the files hold at some time, but of what vLLM has *loaded*, which only the workers know. They read the files just before
and just after vLLM does, and tell the scheduler's side with the reports of that step. Until it knows, requests with this adapter
neither find nor store anything.

vLLM goes on serving from its own prefix cache when it loads other content under the same name and path. So an adapter that was
loaded with two contents, or with one that cannot be read, is *not known* any more for as long as this vLLM lives, and nothing
that it computes is stored. A worker by itself refuses a store that the scheduler's side announced before it knew.
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
"""The salt of an adapter whose content is not known: KV of its requests is neither looked up nor stored."""

ADAPTERS_MAX = 65_536
"""The most adapters that are remembered; those loaded after that are not known."""
_NOT_OF_KV = frozenset(
    {"max_loras", "max_cpu_loras", "max_lora_rank", "max_lora_cls_labels", "default_mm_loras", "specialize_active_lora"}
)
"""vLLM's options for adapters that do not change KV. All others decide what vLLM computes from the same files."""


class Adapter(NamedTuple):
    """An adapter that was loaded: its name and path, which vLLM's keys cover, and a salt for its content, which they do not."""

    name: str
    path: str
    salt: bytes
    why: str = ""
    """The reason, where it is not known."""


class _Salts:
    """The salts of adapters, by name and path; `NOT_KNOWN` for one that had two."""

    def __init__(self) -> None:
        self._salts: dict[tuple[str, str], bytes] = {}

    def _tell(self, adapter: Adapter) -> bool:
        """Notes an adapter's salt. True where that has changed what is known."""
        names, salt = (adapter.name, adapter.path), adapter.salt
        if names not in self._salts and len(self._salts) >= ADAPTERS_MAX:
            return False
        before = self._salts.get(names)
        self._salts[names] = salt if before in (None, salt) else NOT_KNOWN
        return self._salts[names] != before


class Adapters(_Salts):
    """What the workers have told the scheduler's side of adapters."""

    def learn(self, adapter: Adapter) -> None:
        """A worker has loaded this adapter, or reports that it is no longer known."""
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
        """A request's adapter, with the salt of its keys."""
        if lora is None:
            return None
        names = (lora.lora_name, lora.lora_path)
        return Adapter(*names, self._salts.get(names, NOT_KNOWN))


class LoadedAdapters(_Salts):
    """The adapters that vLLM has loaded in a worker."""

    def __init__(self) -> None:
        super().__init__()
        self._by_id: dict[int, Adapter] = {}
        self._news: list[Adapter] = []

    def watch(self) -> None:
        """From now on `loaded` is called for each adapter that vLLM loads."""
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
            # Requests that still use the id under the earlier name are now computed with this adapter's weights.
            reused = f"its id {request.lora_int_id} was given to another adapter"
            self._report(before._replace(salt=NOT_KNOWN, why=reused))
            if not request.load_inplace:
                # And requests with this name and id may have been computed with the earlier weights, before this was loaded.
                adapter = adapter._replace(salt=NOT_KNOWN, why=f"its id {request.lora_int_id} was another adapter's")
        self._by_id[request.lora_int_id] = adapter
        self._report(adapter)

    def _report(self, adapter: Adapter) -> None:
        if self._tell(adapter):
            salt = self._salts[adapter.name, adapter.path]
            why = "" if salt else adapter.why or "its files have changed since vLLM first loaded it"
            self._news.append(adapter._replace(salt=salt, why=why))

    def holds(self, adapter: Adapter | None) -> bool:
        """Has this worker computed with exactly this content, ever since the adapter was first loaded?"""
        return adapter is None or (adapter.salt != NOT_KNOWN and self._salts.get((adapter.name, adapter.path)) == adapter.salt)

    def take_news(self) -> list[Adapter]:
        """Returns the news for the scheduler's side, each once."""
        news, self._news = self._news, []
        return news


_watching: weakref.WeakSet[LoadedAdapters] = weakref.WeakSet()


def _watch_loads() -> None:
    """Wraps the method that loads adapters, because vLLM tells no connector what it loads, and when."""
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
    """The salt of the files that are there now, or `NOT_KNOWN` and the reason. An adapter in a repository is not known: vLLM
    fetches it, at whichever commit it has then."""
    try:
        folder = Path(request.lora_path).expanduser()
        options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        deciding = {name: value for name, value in options.items() if name not in _NOT_OF_KV}
        known = identity.plain([identity.adapter(folder), request.is_3d_lora_weight, deciding])
    except Exception as error:
        return NOT_KNOWN, f"its files cannot be told ({error})"
    return hashlib.sha256(known.encode()).digest()[:SALT_BYTES], ""


def salted(key: bytes, salt: bytes | None) -> bytes:
    """The key that is looked up and stored. Keys are digests, so XOR with a salt keeps them apart from all other keys."""
    if salt is None:
        return key[:SALT_BYTES]
    return (int.from_bytes(key[:SALT_BYTES], "little") ^ int.from_bytes(salt, "little")).to_bytes(SALT_BYTES, "little")


def joined(first: bytes | None, second: bytes | None) -> bytes | None:
    """One salt made of both; either may be missing."""
    if first is None or second is None:
        return first or second
    return hashlib.sha256(first + second).digest()[:SALT_BYTES]
