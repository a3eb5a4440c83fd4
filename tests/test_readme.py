"""What the README and docs/ say of the code is so: commands parse, names exist, columns and
deviations agree, links lead somewhere.
"""

import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import small_config

import eval as eval_module
import pmd
from runtime.files import read_lines
from runtime.methods import method_class
from study import study
from tasks import VERIFIERS, load_task, verify
from tools import figures, plan, report, show_memory

HERE = Path(__file__).resolve().parent.parent
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md")), HERE / "study" / "README.md"]
TEXTS = {str(page.relative_to(HERE)): page.read_text() for page in PAGES}
README = TEXTS["README.md"]
BLOCKS = "\n".join(
    block
    for text in TEXTS.values()
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
)


def commands(script) -> list[list[str]]:
    """The flags of every command of that script in a block of a page."""
    lines = BLOCKS.replace("\\\n", " ").splitlines()
    found = [re.search(rf"(?:^|&& )python {re.escape(script)}\b(.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


def test_pages_are_there():
    assert len(PAGES) >= 12 and len(README.splitlines()) <= 250 and len(README.split()) <= 2000


def test_training_commands_parse(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    flags = [*commands("pmd.py"), *commands("examples/own_method.py")]
    launched = re.findall(r"^ +pmd\.py (.*)$", BLOCKS, re.MULTILINE)
    assert len(flags) >= 15 and len(launched) == 1
    for given in [*flags, shlex.split(launched[0])]:
        if "--help" not in given:
            given = [word.replace("runs/first", str(tmp_path)) for word in given]
            cfg = pmd.parse_flags(given)
            assert isinstance(cfg, pmd.Config)
            for name in filter(None, cfg.compare.split(",")):
                assert method_class(name)


def test_evaluation_commands_parse(monkeypatch):
    class Parsed(Exception):
        """Stops an evaluation once its flags are read."""

    def parse(argv):
        assert isinstance(pmd.parse_flags(argv), pmd.Config)
        raise Parsed

    tables = []
    monkeypatch.setattr(report, "compare", lambda runs: tables.append(runs))
    monkeypatch.setattr(figures, "draw_figures", lambda runs, out: tables.append(runs))
    flags = commands("eval.py")
    assert len(flags) >= 6
    for given in flags:
        if given[0] in ("compare", "figures"):
            eval_module.main(parse, given)
            continue
        with pytest.raises(Parsed):
            eval_module.main(parse, given)
    assert len(tables) >= 3


def test_tools_commands_parse(monkeypatch):
    shown = commands("tools/show_memory.py")
    assert len(shown) >= 4
    for flags in shown:
        with pytest.raises(SystemExit, match="no memory runs/x|bank.jsonl does not"):
            show_memory.main(flags)
    planned = []
    monkeypatch.setattr(plan, "report", lambda *rest: planned.append(rest))
    monkeypatch.setattr(plan, "load", lambda name: name)
    flags = commands("tools/plan.py")
    assert flags
    for given in flags:
        monkeypatch.setattr(sys, "argv", ["plan.py", *given])
        plan.main()
    assert len(planned) == len(flags)


def test_commands_of_ci_are_there():
    """`.ci/run` runs files that exist."""
    script = (HERE / ".ci" / "run").read_text()
    named = re.findall(r"(?:python|\") ((?!\.\.)[\w/]+\.(?:py|txt))", script)
    assert len(named) >= 10
    for path in named:
        assert (HERE / path).is_file(), path


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    folder = (HERE / page).parent
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else HERE / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(file) -> set[str]:
    """The headings of a page as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_named_files_and_functions_exist(page):
    text = TEXTS[page]
    for path in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        if path not in ("path/to/file.py", "methods/NAME.py", *MOVED):
            assert (HERE / path).is_file() or (HERE / page).with_name(path).is_file(), path
    pattern = (
        r"`((?:\w+/)*\w+)\.py:([A-Za-z_.]+)`|`(pmd|memory|kernels|eval)\.([A-Za-z_.]+)(?:\(.*?\))?`"
    )
    for file, name, module, attribute in re.findall(pattern, text):
        if attribute not in ("py", "db") and f"{module}.{attribute}" not in MOVED:
            found = importlib.import_module(module or file.replace("/", "."))
            for part in (name or attribute).split("."):
                found = getattr(found, part)


# Names of earlier commits, which docs/log.md maps to today's
MOVED = {"records.py", "ranks.py", "report.py", "sandbox.py", "eval.VERIFIERS"}


def test_the_algorithm_names_functions():
    rows = re.findall(r"^\| \d+ \| .*$", README, re.MULTILINE)
    assert len(rows) == 12
    assert all(re.search(r"`[\w/]+\.py:[\w.]+`", row) for row in rows)


def test_every_flag_named_exists():
    """Flags that went are named in docs/log.md alone."""
    known = {f.name for f in fields(pmd.Config)} | {
        f.name for f in fields(method_class("srpo").Config)
    }
    known |= {"from", "memory", "n", "help", "what_fits", "peers", "seed", "kills", "dry"}
    known |= {"parts", "quick", "report", "hidden_size", "layers"}  # of study/ and nano/
    known |= {"config"}  # a file of flags
    known |= {"problems"}  # of tools/reads.py
    gone = {flag for row in log_rows("flag that went") for flag in re.findall(r"--(\w+)", row[0])}
    assert len(gone) >= 15 and not gone & known
    for page, text in TEXTS.items():
        named = {flag.removeprefix("no_") for flag in re.findall(r"`--(\w+)", text)}
        allowed = known | gone if page == "docs/log.md" else known
        assert named <= allowed, (page, named - allowed)


def log_rows(heading) -> list[list[str]]:
    """The rows of the table of docs/log.md whose head begins so, cell by cell."""
    table = TEXTS["docs/log.md"].split(f"| {heading} |")[1].split("\n\n")[0]
    return [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]


def test_what_replaces_a_flag_exists():
    for _, cure in log_rows("flag that went"):
        constants = re.findall(r"`([A-Z][A-Z0-9_]+)`", cure)
        files = re.findall(r"\b((?:\w+/)?\w+\.py)\b", cure)
        for constant in constants:
            assert re.search(rf"^(?:\w+, )*{constant}\b.* = ", (HERE / files[0]).read_text(), re.M)


def numbered(text) -> list[str]:
    items = re.findall(r"^\s*\d+\. (.*?)(?=^\s*\d+\. |^\s*\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return [" ".join(item.split()) for item in items]


def test_deviations_are_those_of_the_code():
    code = numbered(pmd.__doc__.split("Deviations from the paper\n")[1])
    page = numbered(TEXTS["docs/readings.md"].split("numbered as at the top of `pmd.py`:\n\n")[1])
    assert len(code) >= 9 and page == code


def test_readings_name_fields():
    table = TEXTS["docs/readings.md"].split("## Deviations")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| ")][2:]
    known = {f.name for f in fields(pmd.Config)} | {"memory.Memory"}
    known |= {"response_novelty", "insight_novelty"}
    assert len(rows) >= 20
    for _, _, field, _ in rows:
        for name in re.findall(r"`([\w.]+)`", field):
            assert name in known or hasattr(pmd, name), name


def test_hooks_and_rows_are_those_of_the_code():
    page = TEXTS["docs/methods.md"]
    hooks = set(re.findall(r"^\| `(\w+)\(.*?\)`", page, re.MULTILINE))
    hooks |= set(re.findall(r"^\| `state\(\)`, `(load)\(state\)`", page, re.MULTILINE))
    own = {name for name, value in vars(pmd.PMD).items() if callable(value) or name == "check"}
    assert hooks == {name for name in own if not name.startswith("_")} - {"Config", "recall"}
    rows = re.findall(r"^\| `(\w+)` \|", page.split("## Rows")[1].split("##")[0], re.MULTILINE)
    assert len(rows) >= 5
    assert set(rows) <= {f.name for f in fields(pmd.Rollout)}


def methods_in(page) -> set[str]:
    return set(re.findall(r"^\| `([\w-]+)` \|", TEXTS[page], re.M))


def test_all_methods_are_in_the_tables():
    there = {p.stem.replace("_", "-") for p in (HERE / "methods").glob("[a-z]*.py")}
    assert there <= methods_in("docs/methods.md")
    shown = there & methods_in("README.md")
    others = re.search(r"^\| (\d+) others \|", README, re.M)
    assert shown and int(others[1]) == len(there - shown)


def test_every_column_of_the_metrics_is_explained(make_config):
    page = TEXTS["docs/metrics.md"]
    step, evaluation = page.split("## A line of a step")[1].split("## A line of an evaluation")
    step, events = step.split("## Memory events")

    def names(table):
        cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
        return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}

    tiers = "experience", "insight", "behavior"
    known_events = names(events) | {
        f"{t}_{e}" for t in tiers for e in ("duplicate", "evicted", "proposed")
    }
    for method in ("pmd", "srpo"):
        cfg = make_config(method=method, name=method)
        pmd.train(cfg)
        for row in read_lines(Path(cfg.out) / method / "metrics.jsonl"):
            known = names(evaluation) if "split" in row else names(step)
            assert set(row) <= known, set(row) - known
            counted = {e for e in row.get("memory_events", {}) if not e.startswith("shortcut_")}
            assert counted <= known_events, counted - known_events


INTERVAL = re.compile(r"[-+]?\d\.\d{3} \[[-+]?\d\.\d{3}, [-+]?\d\.\d{3}\]")


def test_the_results_are_those_of_the_study():
    """The README's table is that of study/results.md, row by row, once all runs of main are made.

    Until then the README counts the runs that are.
    """
    results = re.search(r"^## Results\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
    tables = (HERE / "study" / "results.md").read_text().splitlines()
    rows = [line for line in results.splitlines() if INTERVAL.search(line)]
    made = "## Methods" in tables
    assert bool(rows) == made and all(row in tables for row in rows)
    records = HERE / "study" / "records.jsonl"
    runs = len(read_lines(records)) if records.is_file() else 0
    planned = sum(len(make(dict.fromkeys(study.ARMS, 1e-3))) for make in study.PARTS.values())
    for number in re.findall(r"\d\.\d{3}", "".join(re.findall(r"^- .*$", results, re.MULTILINE))):
        assert any(re.search(rf"[-+]{number} \[", line) for line in tables), number  # a difference
    assert made or f"{runs} of its {planned} runs are made" in " ".join(results.split())


def test_the_parts_of_the_study_are_those_of_its_grid():
    table = re.findall(r"^\| `(\w+)` \| (\d+) \| (\S+) \|", TEXTS["study/README.md"], re.M)
    rates = dict.fromkeys(study.ARMS, 1e-3)
    for (part, runs, hours), (name, make) in zip(table, study.PARTS.items(), strict=True):
        jobs = make(rates)
        spent = sum(job.seconds for job in jobs) / 3600
        assert (part, int(runs), hours) == (name, len(jobs), f"{spent:.1f}")


def test_the_numbers_of_the_demonstration_are_those_of_its_metrics():
    text = TEXTS["study/README.md"]
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


def test_the_example_task_loads(tmp_path):
    subprocess.run([sys.executable, "examples/sums.py", tmp_path / "sums"], cwd=HERE, check=True)
    task = load_task(str(tmp_path / "sums"))
    assert (len(task.train), len(task.dev), len(task.test)) == (63, 7, 30)
    for p in task.test:
        a, b = map(int, re.findall(r"\d", p.prompt))
        assert verify(p, f"{a} + {b} = {a + b}.").reward == 1
        assert verify(p, f"{a + b} or {a + b + 1}").reward == 0


def test_the_verifier_of_ones_own_works(tmp_path, monkeypatch):
    """The README's own task: the file up to where it would start a run, then its problem."""
    code = re.search(r"```python\n(# capitals\.py.*?)```", README, re.DOTALL)[1]
    started = []
    monkeypatch.setattr(pmd, "main", lambda: started.append(True))
    monkeypatch.delitem(VERIFIERS, "name", raising=False)
    exec(compile(code, "capitals.py", "exec"), {"__name__": "__main__"})
    line = re.search(r"^(\{.*\})$", README.split("capitals.py")[-1], re.MULTILINE)[1]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(line + "\n")
    task = load_task(str(tmp_path), dev=0)
    (problem,) = task.test
    assert started and "1 problems of" in task.card  # which stands in both splits here
    assert verify(problem, "Oslo.\n").reward == 1 and verify(problem, "Bergen").reward == 0
    assert verify(problem, " ").feedback == "The reply was empty."


def test_the_method_of_ones_own_is_the_example(tmp_path):
    """The README's own method and examples/own_method.py leave the same rollouts to a teacher."""
    code = re.search(r"```python\n(import pmd\n+class Method.*?)```", README, re.DOTALL)[1]
    (tmp_path / "mine.py").write_text(code)
    mine = method_class(str(tmp_path / "mine.py"))
    example = method_class(str(HERE / "examples" / "own_method.py"))
    assert mine.__mro__[1] is example.__mro__[1] is pmd.PMD
    assert set(vars(mine)) == set(vars(example))


def test_the_loss_of_ones_own_runs():
    code = re.search(r"```python\n(.*?chunked_loss.*?)```", TEXTS["docs/methods.md"], re.DOTALL)[1]
    names = {}
    exec(compile(code, "methods.md", "exec"), names)
    assert names["hidden"].grad.abs().sum() > 0
    p, q = ((names[h] @ names["head"].T).log_softmax(-1) for h in ("hidden", "teacher_hidden"))
    mean = (p.exp() * (p - q)).sum(-1).mean()
    assert float(names["term"].loss.detach()) == pytest.approx(float(mean.detach()), rel=1e-5)


def test_the_method_with_a_loss_of_ones_own_trains(tmp_path):
    """Eq. 7 by a formula: its divergences are those of PMD with --alpha 1, of the same rollouts."""
    page = TEXTS["docs/methods.md"]
    code = re.search(r"```python\n(import pmd\nfrom methods.opsd.*?)```", page, re.DOTALL)[1]
    (tmp_path / "eq7.py").write_text(code)
    found = []
    for name in (str(tmp_path / "eq7.py"), "pmd"):
        cfg = small_config(tmp_path, method=name, name=Path(name).stem, steps=1, alpha=1.0)
        pmd.train(cfg)
        lines = (tmp_path / cfg.name / "metrics.jsonl").read_text().splitlines()
        found += [row["divergence"] for row in map(json.loads, lines) if "divergence" in row]
    assert found[0] > 0 and found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_memory_that_is_shown_is_one_memory():
    """The README shows lines of what docs/memory.md shows whole."""
    shown = re.search(r"```\n(problem vo-zi.*?)```", README, re.DOTALL)[1].splitlines()
    whole = TEXTS["docs/memory.md"].splitlines()
    assert all(line in whole for line in shown)
    assert json.loads(re.search(r"```json\n(.*?)```", README, re.DOTALL)[1])["verifier"] == "name"
