"""Run the vectors on other libraries: `make matrix`, or `python tools/matrix.py NAME`.

Each library has an environment of its own with the versions that its driver names. What
installs on this machine is run, and `results/<library>/<version>.json` says what came
back; what does not install leaves a dated reason there.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections import Counter
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from minipeft import __version__
from minipeft.golden.vectors import V1

ROOT = Path(__file__).parents[1]
DRIVERS = ROOT / "tools" / "implementations"
RESULTS = ROOT / "results"
ENVIRONMENTS = ROOT / "build" / "matrix"

# The implementation to verify, by library; the built-in ones name their packages here.
BUILT_IN = {
    "bitsandbytes": "bitsandbytes==0.50.2 scipy torch==2.13.0",
    "peft": "peft==0.21.2 torch==2.13.0",
    "torchao": "torchao==0.18.0 torch==2.13.0",
}
LIBRARIES = {
    **{name: name for name in BUILT_IN},
    "adapters": "adapters_lora",
    "hqq": "hqq_lora",
    "keras": "keras_dense",
    "litgpt": "litgpt_lora",
    "loralib": "loralib_lora",
    "lycoris-lora": "lycoris_locon",
    "mlx-lm": "mlx_lm_tuner",
    "onnxruntime": "onnxruntime_bnb4",
    "optax": "optax_adamw",
    "qwix": "qwix_codes",
    "torch": "torch_itself",
    "torchtune": "torchtune_lora",
}
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16")  # of a CPU, that change numbers
# Warnings of pip are no reason.
REASON = re.compile(r"^ERROR: (.*)$", re.MULTILINE)


def main() -> None:
    """Verify the libraries that are named, or all."""
    parser = argparse.ArgumentParser(prog="python tools/matrix.py")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(LIBRARIES))
    names = parser.parse_args().names or list(LIBRARIES)
    if unknown := set(names) - set(LIBRARIES):
        parser.error(f"no driver for {', '.join(unknown)}; see {', '.join(LIBRARIES)}")
    for name in names:
        version, found = verify(name)
        path = RESULTS / name / f"{version}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(f"{path.relative_to(ROOT)}: {found.get('reason') or summary(found)}")


def verify(name: str) -> tuple[str, dict[str, Any]]:
    """Return the library's version and its result, or `none` and why there is none."""
    packages = requirements(name)
    today = datetime.now(UTC).date().isoformat()
    about = {"library": name, "minipeft": __version__, "date": today}
    try:
        python = interpreter(name, packages)
    except subprocess.CalledProcessError as error:
        said = REASON.findall(error.stderr) or [error.stderr.strip()[-200:]]
        return "none", {**about, "packages": packages, "reason": said[-1]}
    versions = dict(p.split("==") for p in packages if "==" in p)
    report = run(python, LIBRARIES[name])
    return versions[name], {
        **about,
        "version": versions[name],
        "packages": packages,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": features(),
        **condensed(report),
    }


def requirements(name: str) -> list[str]:
    """Return the packages that the driver's first line names."""
    if name in BUILT_IN:
        return BUILT_IN[name].split()
    first = (DRIVERS / f"{LIBRARIES[name]}.py").read_text().split('"""')[1]
    return first.partition("Packages: ")[2].strip().rstrip(".").split()


def interpreter(name: str, packages: list[str]) -> Path:
    """Return the Python of an environment with these packages; make it if need be."""
    if all(installed(package) for package in packages):
        return Path(sys.executable)
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    wanted = " ".join(packages)
    marker = folder / "packages.txt"
    if marker.exists() and marker.read_text() == wanted:
        return python
    venv.create(folder, with_pip=True)
    # What is installed here lies below: torch for a CPU alone has no name of its own.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "numpy", "ml_dtypes", *packages],
        check=True,
        capture_output=True,
        text=True,
    )
    marker.write_text(wanted)
    return python


def installed(package: str) -> bool:
    """Tell whether the package is here, in this version."""
    name, _, version = package.partition("==")
    try:
        found = metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return False
    return version in ("", found)


def run(python: Path, implementation: str) -> dict[str, Any]:
    """Return the report of `minipeft verify`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [str(python), "-m", "minipeft", "verify", implementation]
        subprocess.run(
            [*command, "--json", str(report)],
            cwd=DRIVERS,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found


def condensed(report: dict[str, Any]) -> dict[str, Any]:
    """Keep the counts of each operation, and of what fails the smallest case."""
    operations: dict[str, dict[str, Any]] = {}
    for case in report["cases"]:
        operation = case["file"].removesuffix(".json")
        entry = operations.setdefault(operation, {"count": Counter(), "failed": []})
        entry["count"][case["status"]] += 1
        if case["status"] == "fail":
            entry["failed"].append(case)
    asked = {}
    for operation, entry in operations.items():
        if set(entry["count"]) == {"skip"}:
            continue
        asked[operation] = {**entry["count"]}
        if entry["failed"]:
            asked[operation]["failed"] = [case["tcId"] for case in entry["failed"]]
            asked[operation]["smallest"] = smallest(operation, entry["failed"])
    agreed = {name: n for name, n in report["choices"]["as"].items() if n}
    choices = {"all": report["choices"]["all"], "as": agreed}
    cases = len(report["cases"])
    return {"cases": cases, "choices": choices, "operations": asked}


def smallest(operation: str, failed: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the failing case with the least input, and what its flags stand for."""
    file = json.loads((V1 / f"{operation}.json").read_text(encoding="utf-8"))
    size = {
        test["tcId"]: sum(len(tensor["data"]) for tensor in test["inputs"].values())
        for group in file["testGroups"]
        for test in group["tests"]
    }
    case = min(failed, key=lambda case: size[case["tcId"]])
    links = [link for flag in case["flags"] for link in file["notes"][flag]["links"]]
    kept = {key: case[key] for key in ("tcId", "comment", "flags", "detail")}
    return {**kept, "links": list(dict.fromkeys(links))}


def features() -> list[str]:
    """Return those of the CPU's features that change numbers."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.exists() else set()
    return [feature for feature in FEATURES if feature in words]


def summary(found: dict[str, Any]) -> str:
    """Say in a line what came back."""
    count: Counter[str] = Counter()
    for entry in found["operations"].values():
        for status in ("pass", "fail", "policy"):
            count[status] += entry.get(status, 0)
    return f"{count['pass']} passed, {count['fail']} failed, {count['policy']} policies"


if __name__ == "__main__":
    main()
