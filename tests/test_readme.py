"""What the README says of the code is so: commands parse, named functions exist, numbers of lines
and deviations agree.
"""

import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import pmd
from runtime.files import read_lines
from tasks import load_task
from tasks.verdicts import VERIFIERS, verify
from tools import show_memory as tools_show_memory

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text()
COMMANDS = re.findall(
    r"^(?:pip .*&& )?python (pmd\.py|examples/own_method\.py)(.*?)(?:\s+#.*)?$",
    README,
    re.MULTILINE,
)


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_commands_parse(script, flags):
    assert isinstance(pmd.parse_flags(shlex.split(flags)), pmd.Config) and (HERE / script).is_file()


def test_memory_commands_parse():
    commands = re.findall(r"^python memory\.py (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert len(commands) >= 4
    for flags in commands:
        with pytest.raises(SystemExit, match="there is no memory runs/x/memory.db"):
            tools_show_memory.main(shlex.split(flags))


def test_there_are_commands_and_every_flag_named_exists():
    assert len(COMMANDS) >= 8
    named = {flag.removeprefix("no_") for flag in re.findall(r"`--(\w+)", README)}
    assert named and named <= {f.name for f in fields(pmd.Config)} | {
        "from",
        "memory",
        "n",
    }  # eval.py's last two


def test_named_functions_exist():
    named = re.findall(
        r"`(pmd|memory|kernels|eval|report|records|ranks)\.(?:py:)?([A-Za-z_.]+)`", README
    )
    assert len(named) > 12
    for module, path in named:
        if path not in ("py", "db"):  # a file's name, no function's
            found = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)


def test_numbers_of_lines():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) == 8
    for name, said in rows:
        assert abs(len((HERE / name).read_text().splitlines()) - int(said)) < 0.05 * int(said), name


def test_deviations_are_those_of_the_code():
    def numbered(text):
        return [
            " ".join(item.split())
            for item in re.findall(r"^\s*\d+\. (.*?)(?=^\s*\d+\. |^\s*\n|\Z)", text, re.M | re.S)
        ]

    code = numbered(pmd.__doc__.split("Deviations from the paper\n")[1])
    said = numbered(README.split("numbered as at the top of `pmd.py`:\n\n")[1])[: len(code)]
    assert len(code) >= 9 and said == code


def test_the_numbers_of_the_study_are_those_of_its_tables():
    """A method's scores stand in its row there; a difference anywhere."""
    said = re.search(r"^## Results\n(.*?)^## ", README, re.M | re.S)[1]
    tables = (HERE / "study" / "results.md").read_text()
    interval = re.compile(r"-?\d\.\d{3} \[-?\d\.\d{3}, -?\d\.\d{3}\]")
    assert len(interval.findall(said)) >= 20 and all(
        found in tables for found in interval.findall(said)
    )
    rows = re.findall(r"^\| (\w[^|(]*?)(?: \(.*?\))? \|(.*?\|.*?)\|", said, re.M)
    assert len([scores for _, scores in rows if interval.search(scores)]) >= 9
    for method, scores in rows:
        for score in interval.findall(scores):
            assert re.search(rf"^\| {re.escape(method)} \|.*{re.escape(score)}", tables, re.M), (
                method,
                score,
            )


def test_the_numbers_of_the_demonstration_are_those_of_its_metrics():
    text = (HERE / "study" / "README.md").read_text()
    for method in ("grpo", "sdpo", "pmd"):
        rows = read_lines(HERE / "study" / "smollm2" / f"{method}.jsonl")
        tests = [row for row in rows if row.get("split") == "test"]
        scores = [f"{row['avg_at_k']:.3f}" for row in tests]
        first, last = ("[{:.3f}, {:.3f}]".format(*tests[i]["interval"]) for i in (0, -1))
        supervised = sum(row.get("supervised_tokens", 0) for row in rows)
        assert (
            f"| {method.upper()} | {scores[0]} {first} | {scores[1]} | {scores[2]} | {scores[3]}"
            f" {last} | {tests[-1]['tokens']:.0f} | {supervised} |" in text
        )
        assert {scores[0], scores[3]} <= set(
            re.findall(r"0\.\d{3}", README.split("On real text")[1].split("## ")[0])
        )


def test_the_example_task_loads(tmp_path):
    subprocess.run([sys.executable, "examples/sums.py", tmp_path / "sums"], cwd=HERE, check=True)
    task = load_task(str(tmp_path / "sums"))
    assert (len(task.train), len(task.dev), len(task.test)) == (63, 7, 30)
    for p in task.test:
        a, b = map(int, re.findall(r"\d", p.prompt))
        assert (
            verify(p, f"{a} + {b} = {a + b}.").reward == 1
            and verify(p, f"{a + b} or {a + b + 1}").reward == 0
        )


def test_the_example_verifier_and_its_row_work(tmp_path, monkeypatch):
    """The README's own task: the file up to where it would start a run, then its problem."""
    code = re.search(r"```python\n(# capitals\.py.*?)```", README, re.DOTALL)[1]
    started = []
    monkeypatch.setattr(pmd, "main", lambda: started.append(True))
    monkeypatch.setattr("eval.VERIFIERS", dict(VERIFIERS))
    exec(compile(code, "capitals.py", "exec"), {})
    line = re.search(r"^(\{.*\})$", README.split("capitals.py")[-1], re.MULTILINE)[1]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(line + "\n")
    (problem,) = load_task(str(tmp_path), dev=0).test
    assert (
        started and verify(problem, "Oslo.\n").reward == 1 and verify(problem, "Bergen").reward == 0
    )
    assert verify(problem, " ").feedback == "The reply was empty."
