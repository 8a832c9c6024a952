"""The vectors alone, their loaders, and the examples in other languages."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from zipfile import ZipFile

import pytest

from minipeft.golden import archive, processes, runner
from minipeft.golden.vectors import V1, load_all
from tests.golden.commands import here, minipeft
from tests.golden.test_verify import SLOWNESS

FILES = list(load_all())
CASES = sum(len(file.cases) for file in FILES)
TENSORS = [
    tensor
    for file in FILES
    for case in file.cases
    for tensor in (*case.question.inputs.values(), *case.outputs.values())
]
BYTES = sum(sum(tensor.data) for tensor in TENSORS)
# The number of cases, and the sum of all bytes of inputs and outputs.
COUNTED = f"{CASES} {BYTES}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("archive")
    archive.main(["--out", str(out)])
    return out


@pytest.fixture(scope="module")
def languages(folder):
    return folder / archive.NAME / "languages"


def need(command):
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")
    return command


def test_checksums_hold(folder):
    sums = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=folder / archive.NAME,
        capture_output=True,
        text=True,
        check=False,
    )
    assert sums.returncode == 0, sums.stderr
    listed = (folder / archive.NAME / "SHA256SUMS").read_text().splitlines()
    with ZipFile(folder / f"{archive.NAME}.zip") as packed:
        assert len(packed.namelist()) == len(listed) + 1
        assert packed.testzip() is None


def test_the_archive_has_the_same_bytes_everywhere(folder, tmp_path):
    archive.main(["--out", str(tmp_path)])
    path = f"{archive.NAME}.zip"
    assert (tmp_path / path).read_bytes() == (folder / path).read_bytes()


def test_what_cannot_be_written_is_one_sentence(tmp_path, capsys):
    old = tmp_path / archive.NAME / "v1" / "old.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    file = tmp_path / "file"
    file.write_text("")
    for out, said in (
        (tmp_path, f"{old} is no file of this archive"),
        (file, f"cannot write {file}"),
        (Path("/dev/null/x"), "cannot write /dev/null"),
    ):
        with pytest.raises(SystemExit) as ended:
            archive.main(["--out", str(out)])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_every_case_is_a_line_that_needs_no_other(folder):
    lines = (folder / archive.NAME / "cases.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == CASES
    first = json.loads(lines[0])
    assert set(first) >= {"operation", "parameters", "compare", "tcId", "inputs"}
    path = V1 / f"{first['operation']}.json"
    group = json.loads(path.read_text())["testGroups"][0]
    assert first["parameters"] == group["parameters"]
    assert group["tests"][0].items() <= first.items()


COUNTERS = Path(__file__).parent / "loaders"


def counted(command):
    paths = sorted(str(path) for path in V1.glob("*.json"))
    return subprocess.run(
        [*map(str, command), *paths], capture_output=True, text=True, check=True
    ).stdout.strip()


def compiled(folder, source):
    """Compile a program in the language of the file's suffix."""
    program = folder / f"{source.stem}.{source.suffix[1:]}.out"
    # g++ looks for some mistakes only where it optimizes; rustc for all, always.
    flags = {
        ".cpp": ["g++", "-std=c++17", "-O", "-Wall", "-Wextra", "-Werror"],
        ".rs": ["rustc", "-D", "warnings"],
    }[source.suffix]
    need(flags[0])
    subprocess.run([*flags, "-o", program, source], check=True)
    return program


def counter(name, languages):
    """Return the command that counts with a loader; compile it once."""
    made = languages / f"{Path(name).stem}.{Path(name).suffix[1:]}.out"
    if name != "count.mjs":
        (languages / name).write_text((COUNTERS / name).read_text())
        return [made if made.exists() else compiled(languages, languages / name)]
    typed = (languages / "minipeft_vectors.ts").read_text()
    text = (COUNTERS / "count.mjs").read_text()
    plain = re.sub(r"export interface \w+ \{.*?\n\}\n", "", typed, flags=re.DOTALL)
    plain = re.sub(r"\((\w+): \w+\): \w+ \{", r"(\1) {", plain)
    script = languages / "count.mjs"
    script.write_text(plain.replace(" as VectorFile", "") + text)
    return [need("node"), script]


@pytest.mark.parametrize("name", ["count.cpp", "count.rs", "count.mjs"])
def test_a_loader_reads_every_byte(name, languages):
    assert counted(counter(name, languages)) == COUNTED


@pytest.mark.parametrize("data", ["0", "zz", "+f", "00é", "0x", "00 "])
@pytest.mark.parametrize("name", ["count.cpp", "count.rs", "count.mjs"])
def test_a_loader_refuses_what_is_no_hexadecimal_text(name, data, languages, tmp_path):
    program = counter(name, languages)
    file = json.loads((V1 / "prompt_forward.json").read_text())
    tensor = file["testGroups"][0]["tests"][0]["inputs"]["X"]
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(file))
    subprocess.run([*program, path], check=True, capture_output=True)
    tensor["data"] = data
    path.write_text(json.dumps(file, ensure_ascii=False), encoding="utf-8")
    done = subprocess.run([*program, path], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "data is no hexadecimal text" in done.stderr


EXAMPLES = ["lora_merge.cpp", "lora_merge.rs", "lora_merge.mjs"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_passes_and_is_short(name, languages):
    path = languages / name
    assert len(path.read_text().splitlines()) <= 80
    if path.suffix == ".mjs":
        command = f"{need('node')} {path}"
    else:
        command = str(compiled(languages, path))
    ours = ("--profile", "minipeft")
    done = minipeft("verify", "--exec", command, "--persistent", *ours)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = load_all(["lora_merge"])
    halves = sum(c.question.inputs["W"].dtype != "float32" for c in file.cases)
    assert f"{len(file.cases) - halves} passed, 0 failed" in done.stdout


def test_a_bug_in_an_example_is_found(languages):
    need("node")
    path = languages / "wrong.mjs"
    text = (languages / "lora_merge.mjs").read_text()
    assert "(rank_stabilized ? Math.sqrt(r) : r)" in text
    path.write_text(text.replace("(rank_stabilized ? Math.sqrt(r) : r)", "r"))
    done = here("verify", "--exec", f"node {path}", "--persistent")
    assert done.returncode == 1
    assert "RankStabilized" in done.stdout


def test_all_cases_take_a_persistent_program_two_seconds(languages):
    need("node")
    path = languages / "asked.mjs"
    text = (languages / "lora_merge.mjs").read_text()
    path.write_text(text.replace(", offers: Object.keys(operations)", ""))
    begun = time.perf_counter()
    program = processes.program(f"node {path}", 10.0)
    outcomes = list(runner.verify(program, FILES))
    program.close()
    seconds = time.perf_counter() - begun
    assert sum("no qlora" in o.detail for o in outcomes) > 0  # all were asked
    assert len(outcomes) == CASES
    assert seconds < 2 * SLOWNESS, f"{seconds:.1f} s"


PERSISTENT = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["command"] == "start":
        print(json.dumps({"ready": "test", "offers": OFFERS}), flush=True)
    elif request["command"] == "stop":
        open("stopped", "w").close()
        break
    else:
        REPLY
"""


def persistent(folder, reply, *more, offers="None"):
    path = folder / "program.py"
    text = PERSISTENT.replace("REPLY", reply).replace("OFFERS", offers)
    path.write_text(text.replace("stopped", str(folder / "stopped")))
    command = f"{sys.executable} {path}"
    return here(
        *("verify", "--exec", command, "--persistent", "--only", "codebook_table"),
        *("--timeout", "1", *more),
    )


def test_stop_is_said_and_what_is_not_offered_is_not_asked(tmp_path):
    done = persistent(tmp_path, "os._exit(1)", offers="['lora_merge']")
    assert "has no function codebook_table" in " ".join(done.stdout.split())
    assert done.returncode == 2
    assert (tmp_path / "stopped").exists()


@pytest.mark.parametrize("shape", [[0, 2**70], [1] * 65, [0, 2**40, 2**40]])
def test_no_shape_ends_the_command(shape, tmp_path):
    data = "" if 0 in shape else "00000000"
    tensor = {"dtype": "float32", "shape": shape, "data": data}
    reply = f"print(json.dumps({{'id': 1, 'outputs': {{'codebook': {tensor}}}}}))\n"
    done = persistent(
        tmp_path, reply + "        sys.stdout.flush()", "--explain", "codebook_table:1"
    )
    assert done.returncode == 1
    assert "no array is that large: give at most 64 axes" in done.stdout


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("os._exit(5)", "the process ended with code 5"),
        ("1/0", "the process ended with code 1: ZeroDivisionError"),
        ('print(\'{"id": 99, "refused": ""}\', flush=True)', "id is not"),
        ("print('no', flush=True)", "no JSON answer, but 'no'"),
        ("print('x' * 2**25, flush=True)", "wrote more than 16 MB"),
        ("import time; time.sleep(9)", "no answer within 1 s"),
    ],
)
def test_a_persistent_program_that_stumbles_is_started_again(reply, said, tmp_path):
    done = persistent(tmp_path, reply)
    assert done.returncode == 1
    assert said in done.stdout
    assert not done.stderr
