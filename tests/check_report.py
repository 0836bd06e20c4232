"""Prints the main numbers of a report: `tests/check_report.py replay|chaos FILE`. Fails where those of a replay are wrong.

(`kvring chaos` fails by itself where its own are wrong.)
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

SHOWN = {
    "replay": ["requests", "hit_rate", "simulated_hit_rate", "lookup_p50_us", "stored_gb", "loaded_gb", "evictions"],
    "chaos": ["kills", "stops", "restarts", "operations", "wrong_bytes", "lost_committed"],
}


def wrong_in_replay(report: dict) -> Iterator[str]:
    for key in ("wrong_bytes", "leaked_slots", "leaked_leases"):
        if report[key] != 0:
            yield f"{key} is {report[key]}"
    difference = abs(report["hit_rate"] - report["simulated_hit_rate"])
    if difference > 0.01:
        yield f"the hit rate is {difference:.4f} away from what is simulated"
    if report["hit_rate"] <= 0 or report["loaded_gb"] <= 0:
        yield "nothing was hit"


def main(kind: str, file: str) -> str | None:
    """What is wrong, for `sys.exit`."""
    report = json.loads(Path(file).read_text())
    numbers = {key: report[key] for key in SHOWN[kind]}
    print("   " + ", ".join(f"{key} {n:.6g}" if isinstance(n, float) else f"{key} {n}" for key, n in numbers.items()))
    wrong = list(wrong_in_replay(report)) if kind == "replay" else []
    return f"{', '.join(wrong)}: {report}" if wrong else None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
