"""Measures the speed of verdicts: beside the official algorithm, per test, and on multiple choice.
Also measures the memory over a thousand programs.

    python benchmarks/harness.py [--quick] [--data ../shared/data/livecodebench/sample.jsonl]
    [--workers 2]

The programs are made here. For each problem of the sample there are two. The right one knows all
tests by heart, so every test is run. The wrong one forgets the third test: there the official
algorithm stops, and ours goes on, for the pass rate. If the file is missing, 90 small problems of
our own take its place.

`official` is the published algorithm in our own code. It forks a process for each program, which
sends its result through a multiprocessing.Manager. All tests run one after another in one
interpreter, with stdin and stdout mocked, the program wrapped in a function, and an alarm per test.
`lean` is the same with a pipe in place of the manager. Both fork from the process that asks, so its
size decides their speed. They are measured from three processes: a bare one, one that has loaded
`datasets`, as LiveCodeBench's own harness has, and one that has loaded all that a trainer has.
Rounds alternate between the contestants, since the machine may be shared. The ratios come last. A
child loads the data, or the first of the three processes would not be bare.
"""

import argparse
import ast
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tasks.code import judge, same_text, same_value
from tasks.livecodebench import code_problem
from tasks.problem import Problem
from tasks.verdicts import verify

STARS = (
    "string",
    "re",
    "datetime",
    "collections",
    "heapq",
    "bisect",
    "copy",
    "math",
    "random",
    "statistics",
    "itertools",
    "functools",
    "operator",
    "io",
    "sys",
    "json",
    "builtins",
    "typing",
)
MADE = [
    code_problem(
        [{"input": f"{n} {i}\n", "output": f"{n * i}"} for i in range(8)], str(n), "Multiply.", ""
    )
    for n in range(90)
]

ASKING = {
    "a bare process": (),
    "one with datasets": ("datasets",),
    "a trainer": (
        "pmd",
        "datasets",
        "sentence_transformers",
        "transformers.models.qwen3.modeling_qwen3",
    ),
}
LOAD = """import json, sys
from tasks import load_task
task = load_task("livecodebench", dev=0, data=sys.argv[1], since="2000-01-01", until="3000-01-01")
print(json.dumps([task.name, [p.extra for p in task.test]]))"""


def by_heart(problem, forget):
    """A program that knows its tests, or all but the one numbered `forget`."""
    tests, name = problem.extra, problem.extra.get("fn_name")
    table = {
        i: o
        for n, (i, o) in enumerate(zip(tests["inputs"], tests["outputs"], strict=True))
        if n != forget
    }
    if name:
        known = {
            repr([json.loads(x) for x in i.split("\n")]): json.loads(o) for i, o in table.items()
        }
        return (
            f"class Solution:\n    def {name}(self, *a): return {known!r}.get(repr(list(a)),"
            " 'forgotten')\n"
        )
    return f"import sys\nprint({table!r}.get(sys.stdin.read(), 'forgotten'))\n"


# -- the official algorithm


def official_tests(code, inputs, outputs, fn_name, time_limit=6):
    """All tests in this interpreter, until one fails."""

    def late(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    prologue = (
        "".join(f"from {m} import *\n" for m in STARS)
        + f"import {', '.join(STARS)}\nsys.setrecursionlimit(50000)\n"
    )
    try:
        if fn_name:
            space = {"__name__": "program"}
            exec(compile(prologue + code, "<string>", "exec"), space)
            function = getattr(space["Solution"](), fn_name)
        else:
            tree = ast.parse(code)
            imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            wrapped = ast.parse("def wrapped_function():\n    pass")
            wrapped.body[0].body = [node for node in tree.body if node not in imports]
            text = "\n".join(map(ast.unparse, imports)) + "\n" + ast.unparse(wrapped)
            space = {"__name__": "program"}
            exec(compile(prologue + text, "<string>", "exec"), space)
        for text, wanted in zip(inputs, outputs, strict=True):
            signal.alarm(time_limit)
            if fn_name:
                right = same_value(json.dumps(function(*map(json.loads, text.split("\n")))), wanted)
            else:
                sys.stdin, printed = io.StringIO(text), io.StringIO()
                with contextlib.redirect_stdout(printed):
                    space["wrapped_function"]()
                right = same_text(printed.getvalue(), wanted)
            signal.alarm(0)
            if not right:
                return False
        return True
    except Exception:
        return False


def official(job):
    with multiprocessing.Manager() as manager:
        result, metadata = manager.list(), manager.list()

        def run():
            result.append(official_tests(*job))
            metadata.append({})

        process = multiprocessing.Process(target=run)
        process.start()
        process.join(7 * len(job[1]) + 5)
        if process.is_alive():
            process.kill()
        return bool(result) and result[0]


def lean(job):
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=lambda: writer.send(official_tests(*job)))
    process.start()
    done = reader.poll(7 * len(job[1]) + 5) and reader.recv()
    process.kill()
    process.join()
    return done


# -- the measurements


def spread(values, unit):
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}] {unit}"


def load(modules):
    """Makes this process as large as one that works with these modules."""
    for name in modules:
        importlib.import_module(name)


def resident():
    """MiB of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def ours(jobs, workers):
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda job: judge(*job).passed, jobs))


def throughput(problems, rounds, workers):
    """Verdicts a second of each contestant, round by round: {(programs, asking process,
    contestant): rates}.
    """
    pools, rates = {}, {}
    for asking, modules in ASKING.items():
        for name in ("ours", "official", "lean"):
            processes = 1 if name == "ours" else workers
            pools[asking, name] = ProcessPoolExecutor(
                processes, initializer=load, initargs=(modules,)
            )
        print(f"{asking}: {pools[asking, 'ours'].submit(resident).result():.0f} MiB")
    for kind, forget in (("right programs", None), ("wrong programs", 2)):
        jobs = [
            (by_heart(p, forget), p.extra["inputs"], p.extra["outputs"], p.extra.get("fn_name"))
            for p in problems
        ]
        for n in range(rounds + 1):
            for (asking, name), pool in sorted(
                pools.items(), key=lambda item, n=n: (item[0][1] != "ours") == n % 2
            ):
                start = time.perf_counter()
                if name == "ours":
                    verdicts = pool.submit(ours, jobs, workers).result()
                else:
                    verdicts = list(pool.map({"official": official, "lean": lean}[name], jobs))
                assert verdicts == [forget is None or len(job[1]) <= forget for job in jobs], (
                    f"{name} is wrong"
                )
                if n:  # the first round warms up
                    rates.setdefault((kind, asking, name), []).append(
                        len(jobs) / (time.perf_counter() - start)
                    )
    for pool in pools.values():
        pool.shutdown()
    return rates


def per_test(repeats):
    """Milliseconds that each further test adds to a program: 41 tests against one."""
    found = {}
    for kind, code, fn_name in (
        ("stdin", "print(int(input()) * 2)", None),
        ("function", "def f(x): return 2 * x", "f"),
    ):
        for _ in range(repeats):
            seconds = []
            for n in (1, 41):
                start = time.perf_counter()
                assert judge(code, ["21"] * n, ["42"] * n, fn_name).passed
                seconds.append(time.perf_counter() - start)
            found.setdefault(f"a program with one test, {kind}", []).append(1000 * seconds[0])
            found.setdefault(f"each further test, {kind}", []).append(
                1000 * (seconds[1] - seconds[0]) / 40
            )
    return found


def memory(programs):
    """Resident MiB of this process after the first tenth of the programs, and after all;
    descriptors likewise.
    """

    def one(n):
        assert not judge("print('7' * 100_000)", ["", "1"], ["7" * 100_000, str(n)]).passed

    with ThreadPoolExecutor(2) as pool:
        for part in (programs // 10, programs - programs // 10):
            list(pool.map(one, range(part)))
            yield resident(), len(os.listdir("/proc/self/fd"))


def choices(n):
    problem = Problem("1", "p", "B", "choice")
    reason = "because of the ions " * 40
    texts = [
        f"<reasoning>{reason}{i}</reasoning>\n<answer>\n{'ABCD'[i % 4]}\n</answer>"
        for i in range(n)
    ]
    start = time.perf_counter()
    right = sum(verify(problem, text).reward for text in texts)
    rate = n / (time.perf_counter() - start)
    assert right == n // 4
    return rate


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    data = "problems with tests, as JSON lines; without the file 90 problems are made"
    parser.add_argument("--data", default=str(shared / "livecodebench" / "sample.jsonl"), help=data)
    parser.add_argument("--workers", type=int, default=2, help="programs at a time (default: 2)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, 100 programs for memory"
    )
    args = parser.parse_args()
    problems, source = MADE, "90 problems made here"
    if Path(args.data).exists():
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD, os.path.abspath(args.data)],
            check=True,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent.parent,
        )
        source, tests = json.loads(loaded.stdout)
        problems = [
            Problem(str(n), "", "its tests", "code", "", extra) for n, extra in enumerate(tests)
        ]
    assert "datasets" not in sys.modules
    print(f"{source}; {args.workers} workers")
    rates = throughput(problems, 1 if args.quick else 5, args.workers)
    for (kind, asking, name), values in rates.items():
        print(f"{kind}, {name} from {asking}: {spread(values, 'verdicts/s')}")
    for kind, values in per_test(3 if args.quick else 15).items():
        print(f"{kind}: {spread(values, 'ms')}")
    (before, open_before), (after, open_after) = memory(100 if args.quick else 1000)
    print(
        f"resident after a tenth and after all programs: {before:.1f} and {after:.1f} MiB; "
        f"descriptors {open_before} and {open_after}"
    )
    print(f"multiple choice: {spread([choices(20_000) for _ in range(5)], 'verdicts/s')}")
    for (kind, asking, name), values in rates.items():
        if name != "ours":
            ratios = [a / b for a, b in zip(rates[kind, asking, "ours"], values, strict=True)]
            print(f"ours / {name} from {asking}, {kind}: {spread(ratios, 'times as fast')}")


if __name__ == "__main__":
    main()
