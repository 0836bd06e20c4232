"""The options in `kv_connector_extra_config`: one table, for parsing, for defaults, and for the table in docs/configuration.md.

An unknown key or a wrong value stops vLLM at its start with an error that names the key. A missing engine does not.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kvring import ConfigError, byte_size, engine_name
from kvring._native import client_defaults

PREFIX = "kvring."
_CLIENT = client_defaults()
"""The options that the connector hands on to every native adapter, with their defaults."""


def _wrong(key: str, expected: str, got: object) -> ConfigError:
    return ConfigError(f"{PREFIX}{key}: expected {expected}, got {got!r}")


def _name(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(key, "a name", value)
    try:
        return engine_name(value)
    except ConfigError as error:
        raise ConfigError(f"{PREFIX}{key}: {error}") from None


def _choice(*choices: str) -> Callable[[str, Any], str]:
    def parse(key: str, value: Any) -> str:
        if value not in choices:
            raise _wrong(key, " or ".join(f'"{choice}"' for choice in choices), value)
        return value

    return parse


def _count(least: int, most: int) -> Callable[[str, Any], int]:
    def parse(key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _wrong(key, f"a whole number from {least} to {most}", value)
        return value

    return parse


def _above_zero(key: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise _wrong(key, "a number above 0", value)
    return float(value)


def _zero_or_more(key: str, value: Any) -> float:
    return 0.0 if value == 0 and not isinstance(value, bool) else _above_zero(key, value)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(key, "a text that is not empty", value)
    return value


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, "true or false", value)
    return value


def _size(key: str, value: Any) -> str:
    """Checks a size as `kvring serve` does, and keeps it as text."""
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise _wrong(key, 'a size such as "32GiB"', value)
    try:
        if byte_size(str(value)) == 0:
            raise ConfigError(f"expected more than no memory, got {value!r}")
    except ConfigError as error:
        raise ConfigError(f"{PREFIX}{key}: {error}") from None
    return str(value)


def _option(default: Any, parse: Callable[[str, Any], Any], meaning: str) -> Any:
    """One option."""
    return field(default=default, metadata={"parse": parse, "meaning": meaning, "obsolete": False})


def _obsolete(parse: Callable[[str, Any], Any]) -> Any:
    """An option of earlier releases about waiting for a lookup's answer. Its value is checked as before, and has no effect."""
    meaning = "no effect: a lookup waits for nothing; accepted for the sake of old configurations"
    return field(default=None, metadata={"parse": parse, "meaning": meaning, "obsolete": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The connector's options. Times that end in `_ms` are milliseconds, `_us` microseconds."""

    name: str = _option(_CLIENT["name"], _name, "the engine's name, as in `kvring serve --name`")
    chunk_blocks: int = _option(1, _count(1, 1024), "vLLM blocks that make a chunk, the unit of looking up and storing")
    lookup: str = _option(
        "poll",
        _choice("poll", "async"),
        "`poll`: a lookup is answered at once; `async`: the same, accepted for the sake of old configurations",
    )
    load: str = _option(
        "async",
        _choice("async", "sync"),
        "`async`: between steps, beside other requests; `sync`: before the forward pass, where a failure can be taken back: one "
        "KV group without a sliding window, no asynchronous scheduling, no pipeline",
    )
    attach_timeout_ms: float = _option(_CLIENT["attach_timeout_ms"], _above_zero, "one attempt to attach to an engine")
    register_timeout_ms: float = _option(
        _CLIENT["register_timeout_ms"], _above_zero, "how long vLLM's start waits for the engine; later it attaches by itself"
    )
    operation_timeout_ms: float = _option(
        _CLIENT["operation_timeout_ms"], _above_zero, "how long a store waits for the engine's answer, in the background"
    )
    drain_timeout_ms: float = _option(_CLIENT["drain_timeout_ms"], _zero_or_more, "how long shutting down waits for stores")
    flush_timeout_ms: float = _option(
        _CLIENT["flush_timeout_ms"],
        _zero_or_more,
        "how long a store may take until it is copied, where vLLM needs its blocks again; and how long it keeps those of a "
        "request that has ended",
    )
    stall_after_ms: float = _option(
        _CLIENT["stall_after_ms"], _above_zero, "an engine that does not move for this long counts as stalled"
    )
    checksum: str = _option(
        "off",
        _choice("off", "store", "verify"),
        "`store`: computed when storing; `verify`: checked when loading as well: a mismatch is a failed load, and the damaged "
        "chunk is found no more and stored again (`chunks_invalidated` in `kvring status`)",
    )
    copy_threads: int | None = _option(
        None, _count(1, 64), "threads that copy, for each worker (KV in CPU memory); unset: 2, or 1 on one CPU"
    )
    copy: str = _option(
        "auto",
        _choice("auto", "batch", "staged", "zerocopy"),
        "how a GPU's KV moves: `batch`: DMA for each contiguous run; `staged`: gathered on the GPU, then DMA; `zerocopy`: by a "
        "kernel; `auto`: measured at start",
    )
    layout: str = _option(
        "auto",
        _choice("auto", "block-outermost", "none"),
        "the KV cache layout that vLLM is asked for on a GPU. `block-outermost` (`BLHNC`): a block is one piece over all layers; "
        "`none`: vLLM's choice; `auto`: `block-outermost`, unless something else may want another one",
    )
    weights_version: str | None = _option(
        None,
        _text,
        "names the weights, beside what their files tell or where nothing does; vLLMs of different ones share nothing",
    )
    autostart: bool = _option(False, _flag, "start an engine where none runs when vLLM starts, and again when it has died")
    arena: str | None = _option(None, _size, "the size of an engine that is started by `autostart`")
    lookup_timeout_ms: float | None = _obsolete(_above_zero)
    poll_interval_us: float | None = _obsolete(_zero_or_more)
    pending_timeout_ms: float | None = _obsolete(_above_zero)

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> Config:
        """Reads `kv_connector_extra_config`. Raises `ConfigError` for wrong values and for unknown keys, also for those without
        the prefix `kvring.`."""
        options = {option.name: option for option in fields(cls)}
        values = {}
        for key, value in extra.items():
            name = key.removeprefix(PREFIX)
            if key == name or name not in options:
                close = difflib.get_close_matches(name, options, n=1)
                hint = f"did you mean {PREFIX}{close[0]}?" if close else "there are: " + ", ".join(PREFIX + o for o in options)
                raise ConfigError(f"kv_connector_extra_config: unknown key {key!r}; {hint}")
            if value is not None:
                values[name] = options[name].metadata["parse"](name, value)
        config = cls(**values)
        if config.autostart and config.arena is None:
            raise ConfigError(f'{PREFIX}arena: expected the size of the engine to start, such as "32GiB", with {PREFIX}autostart')
        if config.arena is not None and not config.autostart:
            raise ConfigError(f"{PREFIX}arena: expected {PREFIX}autostart with it: an engine that runs has its own size")
        return config

    def without_effect(self) -> str | None:
        """One line about the options in `kv_connector_extra_config` that have no effect any more; `None` where there are none."""
        named = [f'{PREFIX}lookup = "async"'] if self.lookup == "async" else []
        given = (option for option in fields(self) if option.metadata["obsolete"] and getattr(self, option.name) is not None)
        named += [PREFIX + option.name for option in given]
        if not named:
            return None
        return (
            f"without effect in kv_connector_extra_config: {', '.join(named)}; a lookup is answered at once now and waits for "
            "nothing, so this can be removed"
        )

    @property
    def client(self) -> dict[str, Any]:
        """The arguments that every native adapter gets."""
        return {option.name: getattr(self, option.name) for option in fields(self) if option.name in _CLIENT}


def _shown(default: Any) -> str:
    if default is None:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def table() -> str:
    """The options as a Markdown table."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for option in fields(Config):
        rows.append(f"| `{PREFIX}{option.name}` | {_shown(option.default)} | {option.metadata['meaning']} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
