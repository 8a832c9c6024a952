"""Profiles: way, exactness, policy and known failures are counted apart."""

import json
from functools import cache

import numpy as np
import pytest

from minipeft.errors import InputError
from minipeft.golden import known, profiles, report
from minipeft.golden.cases.bof4 import FROM_SAMPLES
from minipeft.golden.errors import Refused
from minipeft.golden.implementations import Functions, functions
from minipeft.golden.report import Run
from minipeft.golden.runner import OUR_WAY, verify
from minipeft.golden.vectors import load_all
from minipeft.golden.ways import WAYS
from tests.golden.commands import here, minipeft

pytestmark = pytest.mark.slow

FILES = list(load_all())
PROFILES = profiles.load_all()
CASES = [case for file in FILES for case in file.cases]
OURS = PROFILES[OUR_WAY]
ELSEWHERE = [
    n
    for n, p in PROFILES.items()
    if any(p.expects(c) != OURS.expects(c) for c in CASES)
]


class Follower:
    """An implementation that answers each case as a profile does, from the vectors."""

    def __init__(self, profile):
        self.name = profile.name
        self._profile = profile

    def run(self, case):
        way = self._profile.expects(case)
        of = {w.name: w.outputs for w in case.alternatives}
        outputs = of.get(way) if way != OUR_WAY else case.outputs
        if not outputs:
            raise Refused("as the profile does")
        return outputs

    def close(self):
        pass


@cache
def outcomes(name):
    """Return the outcomes of an implementation that follows a profile."""
    return list(verify(Follower(PROFILES[name]), FILES))


@pytest.mark.parametrize("name", PROFILES)
def test_who_follows_a_profile_passes_under_it_and_is_recognized(name):
    profile, found = PROFILES[name], outcomes(name)
    held = [profiles.hold(profile, outcome) for outcome in found]
    assert {o.status for o in held} == {"pass"}
    assert all(o.exact in (True, None) for o in held)
    agreeing, choices = profiles.followed(found)
    assert agreeing[name] == choices == max(agreeing.values())


def bof4_quantize(W, blocksize):
    """Divide by the signed absmax, and search the table of the paper."""
    flat = np.asarray(W, np.float32).reshape(-1)
    codes, scales = [], []
    for start in range(0, len(flat), blocksize):
        block = flat[start : start + blocksize]
        scales.append(block[np.abs(block).argmax()])
        x = block / scales[-1] if scales[-1] else block
        codes += np.abs(x[:, None] - FROM_SAMPLES).argmin(1).tolist()
    codes += [7] * (len(codes) % 2)
    packed = np.array(codes[::2], np.uint8) << 4 | np.array(codes[1::2], np.uint8)
    return packed, np.array(scales, np.float32)


def test_the_papers_table_of_bof4_is_a_way_and_follows_the_paper():
    own = Functions("paper", {"bof4_quantize": bof4_quantize}.get)
    found = list(verify(own, load_all(["bof4_quantize"])))
    computed = [o for o in found if o.case.result in ("valid", "acceptable")]
    held = [profiles.hold(PROFILES["paper"], outcome) for outcome in computed]
    assert {outcome.status for outcome in held} == {"pass"}
    others = {outcome.way for outcome in computed} - {"", OUR_WAY}
    assert others == {"codes-from-samples"}


@pytest.mark.parametrize("column", ["reference", "torch"])
def test_our_columns_follow_our_profile(column):
    found = verify(functions(column), load_all(["lora", "blockwise"]))
    assert {profiles.hold(OURS, outcome).status for outcome in found} == {"pass"}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_who_goes_another_way_fails_only_under_the_profile(name):
    profile, found = PROFILES[name], outcomes("minipeft")
    assert {o.status for o in found} == {"pass"}
    held = [profiles.hold(profile, outcome) for outcome in found]
    failed = [o for o in held if o.status == "fail"]
    other = [o for o in found if profile.expects(o.case) != OURS.expects(o.case)]
    assert 0 < len(failed) <= len(other)
    assert all(f"profile {name} has" in o.detail for o in failed)


def test_a_refusal_where_all_profiles_compute_is_not_called_our_way():
    (file,) = load_all(["lora_merge"])
    (found,) = (
        outcome
        for outcome in verify(Functions("mine", {"lora_merge": refuses}.get), [file])
        if "ExcessiveRank" in outcome.notes
    )
    assert (found.status, found.way) == ("pass", "refuses")
    held = profiles.hold(OURS, found)
    assert held.detail == (
        "goes the way refuses; profile minipeft has computes-any-rank"
    )


def refuses(**arguments):
    raise ValueError("r is too large")


def test_profiles_name_ways_that_exist():
    for profile in PROFILES.values():
        assert set(profile.ways) <= set(WAYS)
        assert set(profile.cases) <= {f"{c.operation}:{c.tcId}" for c in CASES}
        for case in CASES:
            ways = {way.name for way in case.alternatives}
            assert profile.expects(case) in ways | {OUR_WAY}
    with pytest.raises(InputError, match="no profile 'cuda'; choose one of minipeft"):
        profiles.load("cuda")


def test_a_bound_is_correct_and_not_exact():
    found = tuple(verify(functions("reference"), load_all(["lora_forward"])))
    verdicts = json.loads(report.as_json(Run("reference", found)))["verdicts"]
    assert verdicts["correct"]["no"] == 0
    assert verdicts["bit-exact"]["no"] > 0


def test_a_policy_fails_no_run():
    def lora_merge(W, A, B, alpha, rank_stabilized):
        if len(A):
            return functions("reference").find("lora_merge")(
                W=W, A=A, B=B, alpha=alpha, rank_stabilized=rank_stabilized
            )
        return W  # r is 0

    found = tuple(
        verify(Functions("kind", {"lora_merge": lora_merge}.get), load_all(["lora"]))
    )
    content = json.loads(report.as_json(Run("kind", found)))
    assert content["totals"]["fail"] == 0
    assert content["verdicts"]["policy"]["no"] == content["totals"]["policy"] > 0
    assert content["verdicts"]["correct"]["no"] == 0


BROKEN = ("verify", "tests.impls.broken_nibbles", "--only", "nf4_quantize")


def test_known_failures_are_written_and_do_not_fail(tmp_path):
    path = tmp_path / "known.txt"
    listed = (*BROKEN, "--known-failures", str(path))
    assert minipeft(*listed).returncode == 2  # the file is missing
    assert minipeft(*listed, "--write-known-failures").returncode == 0
    lines = path.read_text().splitlines()
    assert all(line.startswith(("#", "nf4_quantize:")) for line in lines)
    xml = tmp_path / "report.xml"
    done = minipeft(*listed, "--junit", str(xml))
    assert done.returncode == 0
    assert f", {len(lines) - 1} failed as known, " in done.stdout
    assert "a known failure: packed" in xml.read_text()
    path.write_text("\n".join(lines[:-1]))
    assert minipeft(*listed).returncode == 1


def test_a_run_that_asks_less_keeps_the_other_known_failures(tmp_path):
    path = tmp_path / "known.txt"
    path.write_bytes(b"\xef\xbb\xbflora_merge:30\r\nnf4_quantize:9999\r\n")
    listed = (*BROKEN, "--known-failures", str(path), "--write-known-failures")
    done = here(*listed)
    assert done.returncode == 2
    assert "line 2: 'nf4_quantize:9999' is no case" in done.stderr
    path.write_bytes(b"\xef\xbb\xbflora_merge:30\r\nnf4_quantize:18\r\n")
    assert here(*listed).returncode == 0
    names = known.read(path, FILES)
    assert "lora_merge:30" in names
    assert "nf4_quantize:18" not in names  # which passes
    assert len(names) > 30
    assert here(*listed).returncode == 0
    assert known.read(path, FILES) == names
    assert len(path.read_text().splitlines()) == len(names) + 1


def test_a_run_that_stops_leaves_the_known_failures(tmp_path):
    path = tmp_path / "known.txt"
    path.write_text("lora_merge:30\n")
    done = here(
        *("verify", "no.such.module", "--only", "lora_merge"),
        *("--known-failures", str(path), "--write-known-failures"),
    )
    assert done.returncode == 2
    assert path.read_text() == "lora_merge:30\n"


def test_a_known_failure_that_passes_is_reported(tmp_path):
    path = tmp_path / "known.txt"
    path.write_text("# none\nlora_merge:1\n")
    done = minipeft(
        *("verify", "reference", "--only", "lora_merge"),
        *("--known-failures", str(path)),
    )
    assert done.returncode == 0
    assert "pass now; take them out: lora_merge:1" in done.stdout


def test_a_mistyped_known_failure_is_named(tmp_path):
    path = tmp_path / "known.txt"
    path.write_text("lora_merge:1\n\nlora_merge:999 # typed by hand\n")
    with pytest.raises(InputError, match=r"line 3: 'lora_merge:999' is no case"):
        known.read(path, FILES)
    assert minipeft(*BROKEN, "--write-known-failures").returncode == 2


def test_the_profile_is_the_rule(tmp_path):
    ways = ("verify", "reference", "--only", "fp4_quantize")
    assert minipeft(*ways, "--profile", "minipeft").returncode == 0
    done = minipeft(*ways, "--profile", "bnb-cuda")
    assert done.returncode == 1
    assert "goes the way minipeft; profile bnb-cuda has fp4-by-magnitude" in done.stdout
    assert "the rule: profile bnb-cuda" in done.stdout


def test_a_case_is_explained_under_the_profile(tmp_path):
    one = ("verify", "reference", "--explain", "nf4_quantize:26", "--profile")
    assert here(*one, "minipeft").returncode == 0
    done = here(*one, "bnb-cuda")
    assert done.returncode == 1
    assert "goes the way minipeft; profile bnb-cuda has cuda-" in done.stdout
    path = tmp_path / "known.txt"
    path.write_text("nf4_quantize:26\n")
    done = here(*one, "bnb-cuda", "--known-failures", str(path))
    assert done.returncode == 0
    assert "known: goes the way minipeft" in done.stdout


@pytest.mark.parametrize(
    ("name", "color"), [("reference", "brightgreen"), (BROKEN[1], "red")]
)
def test_a_badge(name, color, tmp_path):
    path = tmp_path / "badge.json"
    minipeft("verify", name, "--only", "nf4_quantize", "--badge", str(path))
    badge = json.loads(path.read_text())
    assert badge["color"] == color
    assert badge["schemaVersion"] == 1
    assert set(badge) == {"schemaVersion", "label", "message", "color"}
