"""Numbers beside their goals."""

import statistics
from dataclasses import dataclass


def quantile(values: list[float], part: float) -> float:
    """The value below which `part` of them lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


@dataclass
class Row:
    """One line of the table. `of`: `p50` or `p99`."""

    name: str
    values: list[float]
    unit: str
    goal: float | None = None
    of: str = "p50"
    at_least: bool = False
    note: str = ""

    @property
    def value(self) -> float | None:
        if not self.values:
            return None
        return statistics.median(self.values) if self.of == "p50" else quantile(self.values, 0.99)

    @property
    def met(self) -> bool | None:
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def summary(self) -> dict[str, object]:
        return {"name": self.name.strip(), "value": self.value, "unit": self.unit, "goal": self.goal, "met": self.met}

    def spread(self) -> str:
        """A quarter of the turns were below the first, a quarter above the second."""
        if len(self.values) < 4:
            return ""
        return f"{quantile(self.values, 0.25):.4g} to {quantile(self.values, 0.75):.4g}"


def print_table(rows: list[Row]) -> None:
    width = max(len(row.name) for row in rows)
    print(f"{'':{width}}  {'median':>10} {'':8} {'quartiles':^20} {'goal':>8}")
    for row in rows:
        if row.value is None:
            print(f"{row.name:{width}}  {row.note}")
            continue
        goal = "" if row.goal is None else f"{'≥' if row.at_least else '≤'} {row.goal:g}"
        met = {None: "", True: "met", False: "NOT MET"}[row.met]
        print(f"{row.name:{width}}  {row.value:10.4g} {row.unit:8} {row.spread():^20} {goal:>8}  {met}")
