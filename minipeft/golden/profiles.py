"""Profiles: which of several accepted answers a library is expected to give.

If several answers are in use, a case names its alternatives. A profile is an ordered
list of such names. The expected answer of a case is its first alternative in this list,
and our answer if it has none of them. A profile can also name single cases.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minipeft.errors import InputError
from minipeft.golden.runner import OUR_WAY, REFUSES, Outcome, is_exact
from minipeft.golden.vectors import Case

PROFILES = Path(__file__).with_name("profiles.json")


@dataclass(frozen=True)
class Profile:
    """The answers of one library, or of one paper."""

    name: str
    description: str
    ways: tuple[str, ...]
    cases: dict[str, str]  # the name of the answer, by case

    def expects(self, case: Case) -> str:
        """Return the name of the answer that this profile expects in a case."""
        own = self.cases.get(f"{case.operation}:{case.tcId}")
        if own is not None:
            return own
        offered = {way.name for way in case.alternatives}
        ours = OUR_WAY if case.outputs or not case.alternatives else REFUSES
        return next((way for way in self.ways if way in offered), ours)


def load_all() -> dict[str, Profile]:
    """Return every profile by its name."""
    content = json.loads(PROFILES.read_text(encoding="utf-8"))
    return {name: _profile(name, value) for name, value in content.items()}


def _profile(name: str, value: Mapping[str, Any]) -> Profile:
    ways = value.get("cases", {})
    cases = {case: way for way, cases in ways.items() for case in cases}
    return Profile(name, value["description"], tuple(value["ways"]), cases)


def load(name: str) -> Profile:
    """Return a profile by its name.

    Raises:
        InputError: if no profile has this name.
    """
    profiles = load_all()
    if name not in profiles:
        raise InputError(
            f"there is no profile {name!r}; choose one of {', '.join(profiles)}."
        )
    return profiles[name]


def hold(profile: Profile, outcome: Outcome) -> Outcome:
    """Require the profile: fail every case with another accepted answer."""
    if not outcome.ways or outcome.status != "pass":
        return outcome
    expected = profile.expects(outcome.case)
    if expected not in outcome.ways:
        detail = f"goes the way {outcome.way}; profile {profile.name} has {expected}"
        return replace(outcome, status="fail", detail=detail)
    exact = is_exact(outcome.case, outcome.answer, [expected])
    return replace(outcome, way=expected, exact=exact)


def followed(outcomes: Iterable[Outcome]) -> tuple[dict[str, int], int]:
    """Count the choices in which each profile is followed, and all choices."""
    choices = [outcome for outcome in outcomes if outcome.ways]
    counted = {
        name: sum(profile.expects(choice.case) in choice.ways for choice in choices)
        for name, profile in load_all().items()
    }
    return counted, len(choices)
