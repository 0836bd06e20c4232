"""Tests `tests/run` itself, with a stand-in for cargo that fails where a test asks for it: the sections `format` and `lints` need
nothing else. Also what judges the report of a replay, and whether all say the same of the oldest Rust that is supported.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import unittest
import unittest.mock
from pathlib import Path

from check_report import wrong_in_replay

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "tests" / "run"
REPLAY = {
    "requests": 100,
    "hit_rate": 0.5,
    "simulated_hit_rate": 0.505,
    "loaded_gb": 1.0,
    "wrong_bytes": 0,
    "leaked_slots": 0,
    "leaked_leases": 0,
}
"""The report of a replay in which nothing is wrong."""
CARGO = """#!/bin/sh
case "$*" in
    *--version) echo "cargo, as the tests of tests/run have it" ;;
    *) echo "cargo $*"; eval "$STAND_IN" ;;
esac
"""


def section_names(listed: str) -> list[str]:
    return re.findall(r"^(\S+) +\d+ s  ", listed, re.MULTILINE)


class Run(unittest.TestCase):
    def setUp(self) -> None:
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.scratch = Path(scratch.name)
        (self.scratch / "cargo").write_text(CARGO)
        (self.scratch / "cargo").chmod(0o755)
        self.target = self.scratch / "target"
        self.target.mkdir()

    def run_tests(self, *arguments: str, stand_in: str = "true") -> subprocess.CompletedProcess[str]:
        """Runs `tests/run` in a target directory of its own. Its cargo runs `stand_in`, in sh, whatever it is asked for."""
        path = f"{self.scratch}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "CARGO_TARGET_DIR": str(self.target), "STAND_IN": stand_in}
        return subprocess.run([RUN, *arguments], env=environment, capture_output=True, text=True)

    def summary(self, run: subprocess.CompletedProcess[str]) -> str:
        return run.stdout.partition("== summary\n")[2]

    def test_list_has_every_section_with_its_budget(self) -> None:
        run = self.run_tests("--list")
        self.assertEqual(run.returncode, 0)
        functions = re.findall(r"^section_(\w+)\(\)", RUN.read_text(), re.MULTILINE)
        self.assertEqual(sorted(section_names(run.stdout)), sorted(name.replace("_", "-") for name in functions))

    def test_fast_has_three_minutes(self) -> None:
        listed = self.run_tests("--list").stdout
        budgets = re.findall(r"^\S+ +(\d+) s  \S*fast", listed, re.MULTILINE)
        self.assertIn("5", budgets)
        self.assertLess(sum(map(int, budgets)), 180)

    def test_help(self) -> None:
        for option in ("-h", "--help"):
            run = self.run_tests(option)
            self.assertEqual(run.returncode, 0)
            for named in ("--no-vllm", "--long", "--fast", "--only", "--list"):
                self.assertIn(named, run.stdout)

    def test_an_unknown_section_lists_those_that_there_are(self) -> None:
        known = section_names(self.run_tests("--list").stdout)
        for arguments in (["--only", "nosuch"], ["--only", "format", "nosuch"], ["--only"]):
            run = self.run_tests(*arguments)
            self.assertEqual((run.returncode, run.stdout), (2, ""))
            self.assertEqual(section_names(run.stderr), known)
        self.assertIn("'nosuch'", self.run_tests("--only", "nosuch").stderr)

    def test_wrong_usage(self) -> None:
        for arguments in (["--nosuch"], ["nosuch"], ["--fast", "--long"], ["--only", "format", "--fast"]):
            run = self.run_tests(*arguments)
            self.assertEqual((run.returncode, run.stdout), (2, ""))
            self.assertIn("usage: tests/run", run.stderr)

    def test_only_runs_what_it_is_asked_for(self) -> None:
        run = self.run_tests("--only", "lints", "format", "--no-vllm")
        self.assertEqual(run.returncode, 0, run)
        self.assertEqual(re.findall(r"^== ([\w-]+)", run.stdout, re.MULTILINE), ["format", "lints", "leftovers", "summary"])
        self.assertRegex(self.summary(run), r"(?m)^   format +\d+ s   budget +\d+ s$")
        self.assertIn("NOT run", self.summary(run))

    def test_a_section_that_fails_is_named_and_stops_no_other(self) -> None:
        run = self.run_tests("--only", "format", "lints", stand_in='[ "$1" != fmt ] || exit 7')
        self.assertEqual(run.returncode, 7, run)
        self.assertIn("\ncargo clippy", run.stdout)
        self.assertEqual(re.findall(r"^   (\S+) .* FAILED$", self.summary(run), re.MULTILINE), ["format"])
        self.assertIn("FAILED (exit code 7)", self.summary(run))

    def test_the_wheel_is_made_for_a_section_that_needs_it(self) -> None:
        said = self.scratch / "said"
        tools = self.target / "python" / "bin"
        tools.mkdir(parents=True)
        for tool in ("pip", "python", "pytest"):
            (tools / tool).write_text(f'#!/bin/sh\necho {tool} "$1" >>{said}\n[ "$1" != "$FAILING" ]\n')
            (tools / tool).chmod(0o755)
        run = self.run_tests("--only", "python")
        made = "pip install\npip wheel\n"
        used = "pip install\npython tests/wheel/check.py\npytest -p\n"
        self.assertEqual((run.returncode, said.read_text()), (0, made + used), run)
        said.unlink()
        with unittest.mock.patch.dict(os.environ, FAILING="wheel"):
            self.assertEqual((self.run_tests("--only", "python").returncode, said.read_text()), (1, made))

    def test_a_process_that_is_left_is_a_failure(self) -> None:
        shutil.copy("/bin/sleep", self.target)
        left = self.scratch / "left"
        run = self.run_tests("--only", "format", stand_in=f"{self.target}/sleep 60 >/dev/null 2>&1 & echo $! >{left}")
        os.kill(int(left.read_text()), signal.SIGKILL)
        self.assertEqual(run.returncode, 1, run)
        self.assertIn("still running", run.stderr)
        self.assertEqual(re.findall(r"^   (\S+) .* FAILED$", self.summary(run), re.MULTILINE), ["leftovers"])


class ReportOfAReplay(unittest.TestCase):
    def test_what_is_wrong_is_found(self) -> None:
        self.assertEqual(list(wrong_in_replay(REPLAY)), [])
        wrongs = ({"wrong_bytes": 1}, {"leaked_slots": 1}, {"leaked_leases": 1}, {"hit_rate": 0.4}, {"loaded_gb": 0.0})
        for wrong in wrongs:
            self.assertEqual(len(list(wrong_in_replay(REPLAY | wrong))), 1, wrong)


class OldestRust(unittest.TestCase):
    def test_every_crate_and_the_readme_name_the_one_in_cargo_toml(self) -> None:
        cargo = (ROOT / "Cargo.toml").read_text()
        [oldest] = re.findall(r'^rust-version = "(.*)"$', cargo, re.MULTILINE)
        [members] = re.findall(r"^members = \[(.*)\]$", cargo, re.MULTILINE)
        for member in re.findall(r'"(.*?)"', members):
            self.assertIn("\nrust-version.workspace = true\n", (ROOT / member / "Cargo.toml").read_text(), member)
        self.assertIn(f"Rust ({oldest} or later)", (ROOT / "README.md").read_text())


if __name__ == "__main__":
    unittest.main()
