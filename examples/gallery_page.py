"""The page that gallery.py keeps up to date: written by hand, but for what stands between markers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gallery_charts import Count
from gallery_marks import power

PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, parts: Mapping[str, str]) -> str:
    """The page with these parts in the place of what stood between their markers.

    Raises:
        ValueError: where a part has no markers on the page, or more than one pair.
    """
    places = [found[2] for found in PART.finditer(page)]
    for name in parts:
        if places.count(name) != 1:
            raise ValueError(f"expected '<!-- generated: {name} -->' … '<!-- end -->' once, found {places.count(name)}")
    return PART.sub(lambda found: f"{found[1]}{parts.get(found[2], body(found))}\n{found[3]}", page)


def body(found: re.Match[str]) -> str:
    """What stands between a pair of markers."""
    return found[0][len(found[1]) : -len(found[3])].removesuffix("\n")


def table(counts: Sequence[Count], until: float) -> str:
    """The steps on quadratics as Markdown."""
    lines = [
        f"| condition number | method | lr | momentum | steps to {power(until)} | by the theory's rate "
        "| rate, measured | rate, theory |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for count in counts:
        method = count.method
        lines.append(
            f"| {count.condition:,.0f} | {method.name} | {method.lr:.3g} | {method.momentum:.4g} | {count.steps:,} "
            f"| {count.theory_steps:,.0f} | {count.rate:.5f} | {count.theory_rate:.5f} |"
        )
    return "\n".join(lines)
