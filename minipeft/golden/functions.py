"""The list of functions in the README, written from the table between two markers."""

from pathlib import Path

from minipeft.golden.operations import OPERATIONS

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- the functions -->\n", "<!-- end of the functions -->"


def listed(page: str) -> str:
    """Return a page with the list of functions between its markers."""
    before, rest = page.split(BEGIN)
    lines = (f"    {op.signature(name)}" for name, op in OPERATIONS.items())
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{END}" + rest.split(END)[1]
