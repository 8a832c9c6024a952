"""`minipeft verify` survives any implementation: a report, and no traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from minipeft import cli
from minipeft.golden import child, report, runner
from minipeft.golden.drivers.reference import adapter_files
from minipeft.golden.errors import Late, NoAnswer, Unsupported
from minipeft.golden.implementations import Functions
from minipeft.golden.vectors import load_all
from tests.golden.commands import ROOT, here

OPERATION = "codebook_table"
ONLY = ("--only", OPERATION)
HEAD = "import os, signal, sys, time\nimport numpy as np\n"
RIGHT = "from minipeft.golden.drivers.reference.codebook import codebook_table\n"
NAMES = [case.question.parameters["name"] for case in next(load_all(ONLY[1:])).cases]


def start(folder, *arguments, stdout=subprocess.PIPE):
    """Start the command in a folder, as a user does."""
    return subprocess.Popen(
        [sys.executable, "-m", "minipeft", "verify", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def ask(folder, *arguments, run=here):
    """Return code, stdout, stderr and the report; check all reports."""
    files = folder / "report.json", folder / "report.xml"
    wanted = ("--json", str(files[0]), "--junit", str(files[1]))
    done = run("verify", *arguments, *ONLY, *wanted, folder=folder)
    assert "Traceback" not in done.stdout + done.stderr.partition("minipeft:")[2]
    assert done.returncode in (0, 1, 2)
    suites = ElementTree.parse(files[1]).getroot()
    assert len(suites.findall(f"testsuite[@name='{OPERATION}.json']/testcase")) == 4
    report = json.loads(files[0].read_text(encoding="utf-8"))
    assert len(report["cases"]) == 4
    return done.returncode, done.stdout, done.stderr, report


def apart(command, *arguments, folder):
    """Run the command in a process of its own."""
    process = start(folder, *arguments)
    said = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, *said)


def module(folder, text):
    (folder / "stranger.py").write_text(HEAD + text)
    return "stranger"


def details(report, status="fail"):
    return {case["detail"] for case in report["cases"] if case["status"] == status}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sys.exit(3)", "cannot import 'stranger': SystemExit: 3"),
        ("os._exit(4)", "the process ended with code 4"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process was ended by SIGSEGV"),
        ("time.sleep(100)", "no answer within 0.3 s"),
        ("raise KeyboardInterrupt", "cannot import 'stranger': KeyboardInterrupt"),
        ("import absent", "cannot import 'stranger' (ModuleNotFoundError"),
        ("1 +", "cannot import 'stranger': SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_exit_code_2(text, said, tmp_path):
    name = module(tmp_path, text)
    # Only what never answers gets little time: a busy machine starts the others late.
    timeout = "0.3" if "0.3" in said else "1"
    code, _, stderr, report = ask(tmp_path, name, "--timeout", timeout)
    assert code == 2
    assert said in stderr
    assert said in report["stopped"]
    assert report["totals"]["skip"] == 4


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return np.arange(16)", "codebook has dtype int64"),
        ("return np.array([object()])", "codebook has dtype object"),
        ("return [[1], [2, 3]]", "codebook is no array: ValueError"),
        ("return None", "codebook has dtype object"),
        ("return 'text'", "codebook has dtype <U4"),
        ("return np.zeros((2**21, 3), np.float32)", "codebook has shape"),
        ("return 1, 2", "returned 2 values; the call is codebook_table(name)"),
        ("raise MemoryError('full')", "MemoryError: full"),
        ("import absent", "ModuleNotFoundError"),
        ("import ctypes; ctypes.CDLL('absent.so')", "OSError: absent.so"),
        ("input()", "EOFError: EOF when reading a line"),
        ("next(iter(()))", "StopIteration"),
        ("return codebook_table(name)", "RecursionError"),
        ("sys.exit(5)", "SystemExit: 5"),
        ("os.close(1)\n    os.close(0)\n    os._exit(7)", "ended with code 7"),
        (
            "raise ValueError('\\x1b[31mred')",
            "refused a valid input: ValueError: \\x1b",
        ),
        ("raise ValueError('\\ud800')", "ValueError: \\ud800"),
        ("raise ValueError('\\x00\\uffff')", "ValueError: \\x00\\uffff"),
        ("raise ValueError('a' * 10**6)", "ValueError: aaa"),
        ("raise Mute", "Mute: (its message cannot be shown)"),
        ("os.kill(os.getpid(), 40)", "the process was ended by signal 40"),
        ("print('x' * 10**6); return 1.0", "codebook is float64 of shape []"),
    ],
)
def test_an_answer_of_the_wrong_kind_fails_its_case(body, said, tmp_path):
    mute = "class Mute(Exception):\n    def __str__(self): 1 / 0\n"
    name = module(tmp_path, f"{mute}def codebook_table(name):\n    {body}\n")
    code, stdout, stderr, report = ask(tmp_path, name)
    assert code == 1, stderr
    assert all(said in detail for detail in details(report))
    assert len(details(report)) >= 1
    assert said in stdout
    assert body.startswith("raise") or "refused a valid input" not in stdout
    assert all(len(detail) < 600 for detail in details(report))


def test_a_module_that_crashes_once_fails_one_case(tmp_path):
    crash = "right = codebook_table\ndef codebook_table(name):\n"
    crash += f"    if name == {NAMES[0]!r}: os._exit(1)\n    return right(name)\n"
    code, stdout, _, _ = ask(tmp_path, module(tmp_path, RIGHT + crash), run=apart)
    assert code == 1
    crashes = NAMES.count(NAMES[0])
    assert f"{4 - crashes} passed, {crashes} failed, 0 skipped" in stdout


def test_a_fork_that_keeps_the_pipe_delays_nothing(tmp_path):
    fork = "if os.fork() == 0: time.sleep(60); os._exit(0)\n"
    fork += "def codebook_table(name): os._exit(7)\n"
    begun = time.monotonic()
    code, _, _, report = ask(tmp_path, module(tmp_path, fork), run=apart)
    assert code == 1
    assert details(report) == {"the process ended with code 7"}
    assert time.monotonic() - begun < 30


def test_a_fork_that_returns_twice_answers_once(tmp_path):
    fork = "right = codebook_table\ndef codebook_table(name):\n"
    fork += "    os.fork()\n    return right(name)\n"
    code, stdout, _, _ = ask(tmp_path, module(tmp_path, RIGHT + fork), run=apart)
    assert code == 0, stdout


def test_a_fork_at_import_answers_once(tmp_path):
    fork = "if os.fork(): time.sleep(0.3)\nright = codebook_table\n"
    fork += "def codebook_table(name):\n    time.sleep(0.6)\n    return right(name)\n"
    name = module(tmp_path, RIGHT + fork)
    code, stdout, _, _ = ask(tmp_path, name, run=apart)
    assert code == 0, stdout


def test_a_module_that_starts_only_once_costs_three_starts(tmp_path):
    once = "if os.path.exists('started'): os._exit(9)\nopen('started', 'w')\n"
    once += "def codebook_table(name): os._exit(7)\n"
    code, _, _, report = ask(tmp_path, module(tmp_path, once), run=apart)
    assert code == 1
    assert details(report) == {
        "the process ended with code 7",
        "does not start again: the process ended with code 9",
    }


def test_names_of_the_working_directory_stand_in_for_nothing(tmp_path):
    for taken in ("json", "torch", "numpy", "inspect", "argparse"):
        (tmp_path / f"{taken}.py").write_text("raise SystemExit('the wrong one')\n")
    code, stdout, stderr, _ = ask(tmp_path, module(tmp_path, RIGHT), run=apart)
    assert code == 0, stdout + stderr
    done = subprocess.run(
        [sys.executable, "-m", "minipeft.cli", "verify", "stranger", *ONLY],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "hypothesis.py").write_text(RIGHT)  # installed, and also in this folder
    code, stdout, stderr, _ = ask(tmp_path, "hypothesis", run=apart)
    assert code == 0, stdout + stderr


def program(folder, text, timeout="1"):
    path = folder / "program.sh"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return ("--exec", str(path), "--timeout", timeout)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exit 3", "the process ended with code 3"),
        ("echo no >&2; exit 1", "the process ended with code 1: no"),
        ("kill -40 $$", "the process was ended by signal 40"),
        ("kill -SEGV $$", "the process was ended by SIGSEGV"),
        ("echo hello", "no JSON answer, but 'hello'"),
        ("printf '\\377'", "its output is no UTF-8 text"),
        ("echo '[]'", "its answer is no JSON object"),
        ("echo '{}'", "the answer must hold one of outputs, refused"),
        ("echo '{\"outputs\": 1}'", "outputs must be an object"),
        ('echo \'{"outputs": {"y": 1}}\'', "its outputs are no tensors: 1 is"),
        ("head -c 200000 /dev/zero | tr '\\0' '['", "its JSON is nested too deeply"),
        ("exec cat /dev/zero", "wrote more than 16 MB as one answer"),
        ("cat /dev/zero >&2 & sleep 60", "no answer within 0.3 s"),
        ("exec >&-; sleep 60", "did not end within 0.3 s"),
    ],
)
@pytest.mark.parametrize("how", [(), ("--persistent",)])
def test_a_program_that_never_answers_is_exit_code_2(text, said, how, tmp_path):
    started = program(tmp_path, text, "0.3" if "0.3" in said else "1")
    code, _, stderr, report = ask(tmp_path, *started, *how)
    assert code == 2
    assert ("does not start: " if how else said) in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert report["stopped"]


NODE = """node:internal/modules/cjs/loader:1210
  throw err;
  ^

Error: Cannot find module '/mine.mjs'
    at node:internal/main/run_main_module:28:49 {
  code: 'MODULE_NOT_FOUND',
  requireStack: []
}

Node.js v20.20.2"""
RUST = """thread 'main' (7) panicked at mine.rs:1:84:
index out of bounds: the len is 0 but the index is 6
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace"""
JAVA = """Exception in thread "main" java.lang.IllegalStateException: not now
\tat Mine.main(Mine.java:3)"""


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (NODE, "Error: Cannot find module '/mine.mjs'"),
        ("^\n\nBoom: far\n    at mine.mjs:1:7\n\nNode.js v20.20.2", "Boom: far"),
        (RUST, "index out of bounds: the len is 0 but the index is 6"),
        (JAVA, 'Exception in thread "main" java.lang.IllegalStateException: not now'),
        ("KeyError: 1\nand then: more", "and then: more"),
    ],
)
def test_a_crash_is_told_by_its_message_and_not_by_what_follows(
    written, said, tmp_path
):
    (tmp_path / "written").write_text(written)
    started = program(tmp_path, f"cat {tmp_path}/written >&2; exit 1")
    code, _, stderr, _ = ask(tmp_path, *started, "--persistent")
    assert code == 2
    assert stderr.strip().endswith(f"the process ended with code 1: {said}.")


def test_a_program_that_waits_for_the_end_of_its_input_is_told_of_the_greeting(
    tmp_path,
):
    waits = program(tmp_path, "cat >/dev/null; echo '{}'", "0.3")
    code, _, stderr, _ = ask(tmp_path, *waits, "--persistent")
    assert code == 2
    assert "no answer within 0.3 s (--timeout) to the line that greets it; " in stderr
    assert stderr.strip().endswith("is asked without --persistent.")


def test_a_program_that_crashes_in_one_start_fails_one_case(tmp_path):
    text = "read x\nif [ ! -e crashed ]; then touch crashed; exit 1; fi\n"
    text += 'echo "{\\"unsupported\\": \\"no\\"}"'
    code, stdout, _, _ = ask(tmp_path, *program(tmp_path, text))
    assert code == 1
    assert "0 passed, 1 failed, 3 skipped of 4 cases" in stdout


def test_a_process_left_behind_delays_nothing_and_ends(tmp_path):
    text = 'read x; echo "{\\"refused\\": \\"no\\"}"; sleep 60 & echo $! > left\n'
    begun = time.monotonic()
    code, _, _, report = ask(tmp_path, *program(tmp_path, text))
    assert code == 1
    assert details(report) == {"refused a valid input: no"}
    assert time.monotonic() - begun < 30
    left = Path("/proc", (tmp_path / "left").read_text().strip(), "stat")
    while left.exists() and left.read_text().split()[2] != "Z":  # it is being ended
        assert time.monotonic() - begun < 30
        time.sleep(0.05)


def test_output_without_end_is_not_kept():
    endless = child.Child([sys.executable, "-c", "while 1: print('x' * 4096)"])
    answer = endless.ask(b"", 5)
    assert len(answer) == 4096
    with pytest.raises(Late):  # the pipe is full and has no reader
        endless._exchange(b"", 0.5, lambda: endless._output.clear() or False)
    endless.close()


@pytest.mark.parametrize("where", ["stdout", "stderr"])
def test_a_module_that_prints_without_end_is_bounded_and_reported(where, tmp_path):
    name = module(tmp_path, f"while True: sys.{where}.write('x' * 65536)")
    code, _, stderr, report = ask(tmp_path, name, "--timeout", "1", run=apart)
    assert code == 2
    assert len(stderr) < child.SHOWN + 4096
    assert "what else 'stranger' prints is not shown." in stderr
    assert "no answer within 1 s" in report["cases"][0]["detail"]


def test_three_time_outs_end_an_operation():
    class Slow:
        name = "slow"
        asked = 0

        def run(self, case):
            self.asked += 1
            raise Late("no answer within 1 s (--timeout)")

        def close(self):
            pass

    slow = Slow()
    files = list(load_all(["lora"]))
    outcomes = list(runner.verify(slow, files))
    assert slow.asked == 3 * len(files)
    assert sum(o.status == "fail" for o in outcomes) == 3 * len(files)
    skipped = [o for o in outcomes if o.status == "skip"]
    assert len(skipped) == len(outcomes) - 3 * len(files)
    assert {o.detail for o in skipped} == {"not asked after 3 time-outs"}


def test_head_ends_nothing_early(tmp_path):
    process = start(tmp_path, "reference", "--json", "report.json")
    process.stdout.close()
    with process:
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert len(json.loads((tmp_path / "report.json").read_text())["cases"]) > 700


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_a_closed_stream_ends_nothing(closed, tmp_path, monkeypatch, capsys):
    name = module(tmp_path, f"{RIGHT}print('a word', file=sys.stderr)")
    given = ["verify", name, *ONLY, "--json", "report.json"]
    monkeypatch.chdir(tmp_path)
    for stream in closed:
        monkeypatch.setattr(sys, stream, None)  # as Python finds it after `>&-`
    codes = [cli.main(a) for a in (["verify", "--list"], given, ["inspect", "nowhere"])]
    assert codes == [0, 0, 2]
    assert len(json.loads((tmp_path / "report.json").read_text())["cases"]) == 4
    said = capsys.readouterr()
    assert ("4 passed" in said.out) == ("stdout" not in closed)
    assert ("there is no nowhere" in said.err) == ("stderr" not in closed)
    assert "there is no nowhere" not in said.out


def test_any_encoding_of_stdout_will_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    name = module(tmp_path, "def codebook_table(name): raise ValueError('γₙ')\n")
    _, stdout, stderr, _ = ask(tmp_path, name, run=apart)
    assert "ValueError: \\u03b3" in stdout
    assert not stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_reports_what_it_has(number, tmp_path):
    name = module(
        tmp_path, "def codebook_table(name):\n    open('in', 'w'); time.sleep(60)\n"
    )
    # Who started the tests may ignore a signal, and a child would inherit that.
    before = signal.signal(number, signal.default_int_handler)
    process = start(tmp_path, name, *ONLY, "--json", "report.json")
    signal.signal(number, before)
    while not (tmp_path / "in").exists():
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert stderr == "minipeft: interrupted after 0 cases.\n"
    assert "0 passed, 0 failed, 4 skipped of 4 cases" in stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stopped"] == "interrupted after 0 cases."


def test_what_cannot_be_written_leaves_the_other_report(tmp_path):
    process = start(tmp_path, "reference", *ONLY, "--json", "a", "--junit", "/dev/full")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "cannot write /dev/full: No space left on device" in stderr
    assert "4 passed" in stdout
    assert json.loads((tmp_path / "a").read_text())["totals"]["pass"] == 4


def test_a_full_stdout_is_exit_code_2(tmp_path):
    with open("/dev/full", "w") as full:
        process = start(tmp_path, "reference", *ONLY, "--json", "a", stdout=full)
        _, stderr = process.communicate(timeout=60)
    assert stderr == (
        "minipeft: cannot write stdout: No space left on device; free some space\n"
    )
    assert process.returncode == 2
    assert json.loads((tmp_path / "a").read_text())["totals"]["pass"] == 4


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "report.json")
    process = start(tmp_path, "reference", *ONLY, "--json", "link")
    process.communicate(timeout=60)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "report.json").read_text())["totals"]["pass"] == 4


def judged(function):
    functions = Functions("stranger", {OPERATION: function}.get)
    return list(runner.verify(functions, load_all([OPERATION])))


def test_other_arguments_are_no_refusal():
    outcomes = judged(lambda names: None)
    assert {o.status for o in outcomes} == {"fail"}
    assert all("takes other arguments" in o.detail for o in outcomes)
    assert all("the call is codebook_table(name)" in o.detail for o in outcomes)
    said = report.text(report.Run("stranger", tuple(outcomes)))
    assert f"FAIL  codebook_table.json: {len(outcomes)} cases\n" in said
    assert said.count("takes other arguments") == 1
    assert "effect: " not in said


def test_a_function_that_cannot_be_called_has_no_policy():
    functions = Functions("stranger", {"lora_merge": lambda w, a, b: w}.get)
    outcomes = list(runner.verify(functions, load_all(["lora_merge"])))
    (one,) = (o for o in outcomes if o.case.result == "policy")
    assert one.status == "skip"
    assert {o.status for o in outcomes if o is not one} == {"fail"}
    assert "another policy" not in report.text(report.Run("stranger", tuple(outcomes)))


@pytest.mark.parametrize("accident", [NoAnswer("ended"), Late("no answer")])
def test_a_crash_is_no_policy(accident):
    def lora_merge(**arguments):
        raise accident

    functions = Functions("stranger", {"lora_merge": lora_merge}.get)
    outcomes = list(runner.verify(functions, load_all(["lora_merge"])))
    (one,) = (o for o in outcomes if o.case.result == "policy")
    assert one.status == ("skip" if isinstance(accident, Late) else "fail")
    assert "another policy" not in report.text(report.Run("stranger", tuple(outcomes)))


def test_a_setting_that_is_overwritten_is_a_failure():
    def adapter_config_scaling(config, **arguments):
        right = adapter_files.adapter_config_scaling(config=config, **arguments)
        config.pop("rank_pattern", None)
        return right

    name = "adapter_config_scaling"
    functions = Functions("stranger", {name: adapter_config_scaling}.get)
    found = list(runner.verify(functions, load_all([name])))
    wrong = [o for o in found if o.detail == "overwrote a setting in its arguments"]
    with_patterns = [
        o for o in found if "rank_pattern" in o.case.question.parameters["config"]
    ]
    assert 0 < len(wrong) <= len(with_patterns)
    assert len([o for o in found if o.status == "fail"]) == len(wrong)


@pytest.mark.parametrize("reason", [NotImplementedError("later"), Unsupported("later")])
def test_what_is_not_implemented_is_not_offered(reason):
    def codebook_table(name):
        raise reason

    assert {o.status for o in judged(codebook_table)} == {"skip"}


def test_a_name_that_is_no_function_is_not_offered():
    assert {o.detail for o in judged(3)} == {"stranger has no function codebook_table"}
