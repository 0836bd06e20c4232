"""What the connector says of the engine's health in vLLM's log: each transition once."""

import itertools
import re

TRANSITIONS = (
    "connected to the kvring engine",
    "the kvring engine is not available",
    "the kvring engine responds again",
)

_LINE = re.compile(rf"\((?P<process>[^)]*pid=\d+)\).*?\] kvring: (?P<what>(?:{'|'.join(TRANSITIONS)}).*?role=(?P<role>\w+).*)")


def transitions(log: str) -> dict[tuple[str, str], list[str]]:
    """By process and role: what was said, in order, to the end of the line: `reason=…` is part of it."""
    said: dict[tuple[str, str], list[str]] = {}
    for found in map(_LINE.search, log.splitlines()):
        if found is not None:
            said.setdefault((found["process"], found["role"]), []).append(found["what"])
    return said


def repeated(log: str) -> list[str]:
    """Transitions that were said twice in a row, which none should be."""
    return [
        f"{role} in {process}: {one}"
        for (process, role), what in transitions(log).items()
        for one, other in itertools.pairwise(what)
        if one == other
    ]
