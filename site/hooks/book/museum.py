"""Bugs that libraries had, as the tests keep them, with the vectors that find them."""

import re
import sys
from importlib import import_module
from pathlib import Path

REPORT = re.compile(r"https://github\.com/[^/]+/([^/]+)/(?:issues|pull)/(\d+)")


def table(root: Path) -> str:
    """Run every wrong implementation again, and list what finds it."""
    # The tests belong to no package that is installed.
    sys.path.insert(0, str(root))
    try:
        exhibits = import_module("tests.impls.museum").exhibits()
    finally:
        sys.path.remove(str(root))
    lines = ["| Library | What happened | Flag | Vector |", "|:--|:--|:--|:--|"]
    for exhibit in exhibits:
        reports = " ".join(f"[{name(link)}]({link})" for link in exhibit.links)
        lines.append(
            f"| {exhibit.library} {reports} | {exhibit.story} "
            f"| {exhibit.flag} | `{exhibit.vector}` |"
        )
    return "\n".join(lines)


def name(link: str) -> str:
    """Return the repository and the number of a report."""
    found = REPORT.fullmatch(link)
    if found is None:
        raise ValueError(f"{link} is no issue and no pull request")
    return f"{found[1]}#{found[2]}"
