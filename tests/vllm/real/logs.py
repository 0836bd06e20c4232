"""The connector's lines on the engine's health in vLLM's log: one for each transition."""

import itertools
import re

TRANSITIONS = (
    "connected to the kvring engine",
    "the kvring engine is not available",
    "the kvring engine responds again",
)

_LINE = re.compile(rf"\((?P<process>[^)]*pid=\d+)\).*?\] kvring: (?P<what>(?:{'|'.join(TRANSITIONS)}).*?role=(?P<role>\w+).*)")


def transitions(log: str) -> dict[tuple[str, str], list[str]]:
    """By process and role: the transitions in their order, to the end of the line, with `reason=…`."""
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
