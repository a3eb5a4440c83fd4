"""Verdicts on programs: extraction, comparison, feedback, protocols of LiveCodeBench.
test_sandbox.py has the sandbox.
"""

import base64
import io
import json
import pickle
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sandbox import reason

from tasks import livecodebench, load_task
from tasks.code import extract_code, judge, no_code, same_text, same_value
from tasks.livecodebench import LIVECODEBENCH_FILES, LIVECODEBENCH_HUB, code_problem, decode_tests
from tasks.problem import Problem
from tasks.reading import read_problems
from tasks.sandbox import DISK
from tasks.verdicts import verify, verify_all

HERE = Path(__file__).resolve().parent.parent
runs_code = pytest.mark.skipif(bool(reason), reason=reason)


@pytest.mark.parametrize(
    "text, longest, last",
    [
        ("```python\na\n```", "a\n", "a"),
        ("```\na\n```", "a\n", "a"),
        ("no code", "", ""),
        ("```python\na", "", ""),
        ("```python\nlong one\n```\nor\n```python\nb\n```", "long one\n", "b"),
        ("```python\nlong one\n```\nfor example\n```\n7\n```", "long one\n", "7"),
        ("```python\na\n```\nand an open one\n```python\nlong but open", "a\n", "and an open one"),
        ("  ```python\n  a\n  ```", "  a\n  ", "  a"),
        ("```c++\na\n```", "", "a"),
    ],
)
def test_which_block(text, longest, last):
    assert extract_code(text, "longest") == longest
    assert extract_code(text, "last") == last


@pytest.mark.parametrize(
    "output, expected, right",
    [
        ("1 2\n", "1 2", 1),
        (" 1 2 \n\n", "1 2", 1),
        ("1  2", "1 2", 1),
        ("1 2", "1\n2", 0),
        ("1\n\n2", "1\n2", 0),
        ("1.0", "1", 1),
        ("1e3", "1000", 1),
        ("-0", "0", 1),
        ("0.1", "0.10000000001", 0),
        ("yes", "YES", 0),
        ("a  b", "a b", 0),
        ("1 a", "1.0 a", 0),
        ("nan", "nan", 1),
        ("nan 1", "nan  1", 0),
        ("snan 1", "1 1", 0),
        ("", "", 1),
        ("0", "", 0),
        ("#-#-", "#-#-", 1),
        ("1 2 3", "1 2", 0),
        ("inf", "1" + "0" * 400, 0),
        ("1e400", "inf", 0),
    ],
)
def test_stdout_is_compared_by_the_official_rule(output, expected, right):
    assert same_text(output, expected) == right


@given(st.lists(st.lists(st.integers(-(10**20), 10**20), min_size=1), min_size=1), st.data())
@settings(max_examples=60)
def test_blanks_at_line_ends_never_matter_and_values_always_do(rows, data):
    text = "\n".join(" ".join(map(str, row)) for row in rows)
    loose = "\n".join(f" {line}  " for line in text.split("\n")) + "\n\n"
    assert same_text(loose, text) and same_text(text, loose)
    i = data.draw(st.integers(0, len(rows) - 1))
    rows[i][-1] += 1
    assert not same_text("\n".join(" ".join(map(str, row)) for row in rows), text)


@pytest.mark.parametrize(
    "output, expected, right",
    [
        ("[1, 2]", "[1,2]", 1),
        ("2.0", "2", 1),
        ("true", "1", 1),
        ('"a"', "a", 0),
        ("null", "null", 1),
        ("[[2]]", "[2]", 0),
        ("", "1", 0),
        ("nope", "1", 0),
        ("[" * 10**6, "1", 0),
        ("9" * 10_000, "1", 0),
        ("9" * 10_000, "9" * 10_000, 1),
        ("NaN", "1", 0),
        ('"1"', "1", 0),
        ('{"a": 1}', '{"a": 1.0}', 1),
    ],
)
def test_values_are_compared_as_json(output, expected, right):
    assert same_value(output, expected) == right


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**30), 10**30)
        | st.floats(allow_nan=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
def test_the_longest_text_of_a_value_equals_its_shortest(value):
    short = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert same_value(json.dumps(value, indent=1 if len(short) < 50 else None), short)


def test_comparing_takes_no_time_from_the_judge():
    """Sixteen MiB, as much as may come back, against answers of a few characters: they need not be
    parsed.
    """
    for same, texts in (
        (same_value, ("[" + "[]," * 5_000_000 + "[]]", "[" + "1," * 7_500_000 + "1]")),
        (same_text, ("a\n" * 7_500_000, "1 " * 7_500_000)),
    ):
        for text in texts:
            start = time.process_time()
            assert not same(text, "[1]")
            assert time.process_time() - start < 0.3


# -- feedback


@runs_code
def test_feedback_shows_an_error_before_a_timeout_before_wrong_answers():
    code = (
        "n = int(input())\nif n == 1: print(0)\nif n == 2:\n  while True: pass\nif n == 3:\n  x ="
        " [\n   ][n]\nprint(n)"
    )
    wrong = judge(code, ["1", "4"], ["1", "4"])
    assert wrong.feedback == "Test Case 1: Wrong Answer\n\nInput\n1\n\nOutput\n0\n1\n\nExpected\n1"
    assert (wrong.passed, wrong.status, wrong.n_passed) == (False, "wrong_answer", 1)
    slow = judge(code, ["1", "2"], ["1", "2"], time_limit=0.2)
    assert (slow.status, slow.feedback) == (
        "time_limit",
        "Time Limit Exceeded\n\nLast Executed Input\n2",
    )
    error = judge(code, ["1", "3", "2"], ["1", "3", "2"], time_limit=0.2)
    assert error.status == "runtime_error" and error.n_passed == 0
    assert (
        error.feedback
        == "Runtime Error\nIndexError: list index out of range\n  x = [\nLine 6 in <module>"
        " (Solution.py)\n\nLast Executed Input\n3"
    )


@runs_code
def test_feedback_shows_the_two_shortest_wrong_answers_and_not_those_that_passed():
    inputs = ["111111", "22", "3", "4444"]
    found = judge("x = input()\nprint(x if x == '3' else x + '!')", inputs, inputs)
    assert re.findall("Case .", found.feedback) == ["Case 2", "Case 4"]
    assert "111111" not in found.feedback and found.n_passed == 1


@runs_code
def test_feedback_is_short():
    long = "\n".join("7" * 5000 for _ in range(50))
    for code in (
        "print(open(0).read() * 2)",
        "raise ValueError(open(0).read())",
        "print(" + "9" * 5000,
        "f(" * 90,
    ):
        found = judge(code, [long, long + "1"], ["8" * 5000, "9" * 5000])
        assert not found.passed and 0 < len(found.feedback) <= 2000
    short = "\n".join("77777777" for _ in range(50))
    shown = judge("print(open(0).read() * 2)", [short], ["8" * 5000]).feedback
    assert shown.split("\n\n")[1].count("7" * 8) == 8 and shown.endswith(
        "Expected\n" + "8" * 250 + "..."
    )


@runs_code
def test_a_traceback_shows_the_programs_last_three_frames_only():
    code = (
        "import json\ndef a(s): return b(s)\ndef b(s): return c(s)\ndef c(s):\n    return"
        " json.loads(s)\na(input())"
    )
    assert judge(code, ["{"], [""]).feedback.split("\n")[2:8] == [
        "  def a(s): return b(s)",
        "Line 2 in a (Solution.py)",
        "  def b(s): return c(s)",
        "Line 3 in b (Solution.py)",
        "  return json.loads(s)",
        "Line 5 in c (Solution.py)",
    ]
    assert judge("x = 1\ny = = 2", [""], [""]).feedback.startswith(
        "Runtime Error\nSyntaxError: invalid syntax"
    )
    assert "Line 2 in <module>" in judge("x = 1\ny = = 2", [""], [""]).feedback


def test_judge_wants_tests():
    with pytest.raises(ValueError, match="1 inputs and 2 outputs"):
        judge("", ["1"], ["1", "2"])
    with pytest.raises(ValueError, match="at least one"):
        judge("", [], [])


@runs_code
def test_the_reward_is_sparse_and_the_pass_rate_stands_beside_it():
    tests = [{"input": str(i), "output": str(min(i, 2))} for i in range(4)]
    problem = code_problem(tests, "p", "Halt at two.", "", feedback=True)
    half = verify(problem, "```python\nprint(input())\n```")
    assert (half.reward, half.test_pass_rate, half.status) == (
        0.0,
        0.75,
        "wrong_answer",
    ) and "Expected\n2" in half.feedback
    full = verify(problem, "Think.\n```python\nprint(min(int(input()), 2))\n```")
    assert (full.reward, full.test_pass_rate, full.status, full.feedback) == (
        1.0,
        1.0,
        "passed",
        "",
    )
    assert full.answer == "print(min(int(input()), 2))\n"
    none = verify(problem, "I can't.")
    assert (none.reward, none.test_pass_rate, none.status) == (0.0, 0.0, "no_code")
    assert none.feedback.startswith("Incorrect Format")
    assert verify(problem, "```python\nprint(").feedback.startswith("Truncated Attempt")
    silent = code_problem(tests, "p", "Halt at two.", "", feedback=False)
    for text in ("```python\nprint(input())\n```", "I can't.", "```python\n1 / 0\n```"):
        assert verify(silent, text).feedback == "" and verify(silent, text).reward == 0
    texts = [f"```python\nprint(min(int(input()), {n}))\n```" for n in (1, 2, 3)] * 3
    assert [v.reward for v in verify_all([problem] * 9, texts)] == [0, 1, 0] * 3


@pytest.mark.parametrize(
    "text, said",
    [
        ("I can't.", "There is no code block"),
        ("```python\nprint(1)", "has no end"),
        ("```python\n```\n```", "has no end"),
        ("```python\r\nprint(1)\r\n```", "can't be read"),
        ("```python title=a.py\nprint(1)\n```", "can't be read"),
        ("```python \nprint(1)\n```", "can't be read"),
        ("``` python\nprint(1)\n```", "can't be read"),
        ("```c++\nprint(1)\n```", "can't be read"),
        ("```{python}\nprint(1)\n```", "can't be read"),
        ("```python\n\n```", "has no line of code"),
        ("```print(1)```", "has no line of code"),
        ("``````", "has no line of code"),
    ],
)
def test_the_feedback_says_what_is_wrong_with_the_block(text, said):
    """SDPO's rule finds no code in any of these; only where there is no fence is there no block."""
    found = verify(code_problem([{"input": "", "output": "1"}], "p", "q", "", feedback=True), text)
    assert extract_code(text).strip() == "" and (found.reward, found.status) == (0, "no_code")
    assert said in found.feedback and ("There is no code block" in found.feedback) == (
        "```" not in text
    )


def test_the_feedback_on_many_fences_takes_linear_time():
    started = time.process_time()
    for part in ("`", "``` ", "```a", "```\n"):
        no_code(part * 40_000)
    assert time.process_time() - started < 1


# -- files


def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def row(n, date, function=False, hidden=5, **changes):
    """A problem in the official schema: double a number."""
    kind = "functional" if function else "stdin"
    tests = [
        {"input": str(i), "output": str(2 * i), "testtype": kind}
        for i in range(100 * n, 100 * n + hidden + 1)
    ]
    return {
        "question_title": f"Double {n}",
        "question_content": f"Double the number, {n}.",
        "platform": "leetcode",
        "question_id": f"q{n}",
        "contest_id": "c",
        "contest_date": f"{date}T00:00:00",
        "starter_code": (
            "class Solution:\n    def double(self, x: int) -> int:\n        " if function else ""
        ),
        "difficulty": "easy",
        "public_test_cases": json.dumps(tests[:1]),
        "private_test_cases": packed(tests[1:]),
        "metadata": json.dumps({"func_name": "double"} if function else {}),
        **changes,
    }


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="lcb.jsonl"):
        text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n"
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
        return str(tmp_path / name)

    return write


def test_datasets_is_imported_by_livecodebench_alone():
    code = (
        "import sys, tasks; tasks.load_task('nano'); print('datasets' in sys.modules, 'pyarrow' in"
        " sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


def test_the_window_and_the_halves(write, tmp_path):
    write(
        row(1, "2025-01-31"),
        row(2, "2025-02-01", hidden=5),
        row(3, "2025-04-30", True, hidden=1),
        row(4, "2025-05-01"),
    )
    task = load_task("livecodebench", dev=0, data=str(tmp_path))  # a folder
    assert task.name == "livecodebench (sdpo, 2025-02-01 to 2025-05-01, 2 of 131 problems)"
    assert [p.id for p in task.train] == [p.id for p in task.test] == ["q2", "q3"]
    assert [p.prompt for p in task.train] == [p.prompt for p in task.test]
    for train, test, n in zip(task.train, task.test, (5, 1), strict=True):
        assert len(test.extra["inputs"]) == n and len(train.extra["inputs"]) == max(1, n // 2)
        # the file's order
        assert all(p.extra["inputs"] == sorted(p.extra["inputs"]) for p in (train, test))
        pairs = [
            list(zip(p.extra["inputs"], p.extra["outputs"], strict=True)) for p in (train, test)
        ]
        assert set(pairs[0]) <= set(pairs[1]) and all(int(o) == 2 * int(i) for i, o in pairs[1])
        assert train.extra["feedback"] and not test.extra["feedback"] and train.verifier == "code"
    assert task.train == load_task("livecodebench", dev=0, data=str(tmp_path)).train
    stdin, function = task.test
    assert (
        function.prompt.endswith("```python\ndef double(x: int) -> int:\n```")
        and "signature" not in stdin.prompt
    )
    assert function.extra["fn_name"] == "double" and stdin.extra["fn_name"] is None
    assert stdin.system == "" and stdin.extra["block"] == "longest"


@runs_code
def test_the_other_protocols(write):
    path = write(
        row(1, "2024-12-31"), row(2, "2025-02-01", True), row(3, "2025-03-01"), row(4, "2025-05-01")
    )
    older = load_task("livecodebench", dev=0, data=path, protocol="older")
    assert [p.id for p in older.train] == ["q1"] and [p.id for p in older.test] == ["q2", "q3"]
    assert older.train[0].extra["feedback"] and len(older.train[0].extra["inputs"]) == 5
    official = load_task("livecodebench", dev=0, data=path, protocol="official")
    assert [len(p.extra["inputs"]) for p in official.train + official.test] == [1, 1, 6, 6]
    function = official.test[0]
    assert function.system and "class Solution:\n    def double(self, x: int)" in function.prompt
    code = "```python\nclass Solution:\n    def double(self, x): return 2 * x\n```"
    assert (
        verify(
            function,
            "```python\nprint('a long draft, and a wrong one')\n" + "#" * 99 + "\n```\n" + code,
        ).reward
        == 1
    )
    assert (
        verify(official.test[1], "```python\n# YOUR CODE HERE\nprint(2 * int(input()))\n```").reward
        == 1
    )
    assert verify(older.test[0], "```python\ndef double(x): return 2 * x\n```").reward == 1
    wide = load_task("livecodebench", dev=0, data=path, since="2024-01-01", until="2026-01-01")
    assert (
        len(wide.test) == 4
        and wide.name == "livecodebench (sdpo, 2024-01-01 to 2026-01-01, 4 problems)"
    )


class Evil:
    def __reduce__(self):
        return print, ("pwned",)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode(),
            "UnpicklingError: it names builtins.print",
        ),
        (base64.b64encode(zlib.compress(pickle.dumps(["a"]))).decode(), "TypeError"),
        (base64.b64encode(zlib.compress(pickle.dumps("not json"))).decode(), "JSONDecodeError"),
        (base64.b64encode(b"not zlib").decode(), "error"),
        ("not base64!", "Error"),
        (packed([{}])[:-20], "rror"),
        (packed([{"input": "1"}]), "KeyError: 'output'"),
        ("[1, 2", "JSONDecodeError"),
        ('[{"input": "1", "output": null}]', "an input or output is no text"),
        ('[{"input": [1], "output": "1"}]', "an input or output is no text"),
    ],
)
def test_hidden_tests_are_decoded_without_running_anything(text, message, capsys):
    with pytest.raises(ValueError, match=f"its tests can't be decoded: .*{message}"):
        decode_tests(text)
    assert capsys.readouterr().out == ""


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 10**6),
)
@settings(max_examples=300, deadline=None)
def test_a_broken_pickle_is_one_sentence(changes, length):
    data = bytearray(pickle.dumps(json.dumps([{"input": "1", "output": "2"}])))
    for place, byte in changes:
        data[place % len(data)] = byte
    for text in (bytes(data), bytes(data[: length % len(data)]), b"Va\n}b.", b"X\xff\xff\xff\xff."):
        try:
            decode_tests(base64.b64encode(zlib.compress(text)).decode())
        except ValueError as error:
            assert str(error).startswith("its tests can't be decoded") and "\n" not in str(error)


def test_tests_in_both_encodings():
    tests = [{"input": "1\n", "output": "é"}]
    assert decode_tests(packed(tests)) == decode_tests(json.dumps(tests)) == tests
    assert decode_tests(json.dumps(tests, indent=1)) == tests


def test_the_hubs_files_are_loaded_by_their_names(write, tmp_path, monkeypatch):
    """A folder like the Hub's: six files beside a loading script, which `datasets` refuses, and a
    card; see SDPO's order.
    """
    days = ["2023-05-01", "2025-02-01", "2025-02-02", "2025-04-30", "2025-05-01", "2025-03-01"]
    for n, (name, day) in enumerate(zip(LIVECODEBENCH_FILES, days, strict=True)):
        write(row(2 * n, day), row(2 * n + 1, day, function=True, hidden=7), name=name)
    (tmp_path / "code_generation_lite.py").write_text(
        "raise SystemExit('a loading script has run')"
    )
    (tmp_path / "README.md").write_text("---\nlicense: cc\n---\n")
    assert LIVECODEBENCH_FILES == tuple(f"test{n}.jsonl" for n in ("", 2, 3, 4, 5, 6))
    assert LIVECODEBENCH_HUB == "hf://datasets/livecodebench/code_generation_lite"
    monkeypatch.setattr(livecodebench, "LIVECODEBENCH_HUB", str(tmp_path))
    hub, local = (
        load_task("livecodebench", dev=0),
        load_task("livecodebench", dev=0, data=str(tmp_path)),
    )
    assert [p.id for p in hub.test] == [f"q{n}" for n in (2, 3, 4, 5, 6, 7, 10, 11)]
    assert hub == local and [p.extra for p in hub.train + hub.test] == [
        p.extra for p in local.train + local.test
    ]
    rng = np.random.RandomState(0)  # np.random.seed(0), problem by problem
    for p, whole in zip(hub.train, hub.test, strict=True):
        n = len(whole.extra["inputs"])
        kept = sorted(rng.choice(n, max(1, int(n / 2)), replace=False))
        assert p.extra["inputs"] == [whole.extra["inputs"][i] for i in kept]
    (tmp_path / "test4.jsonl").unlink()
    with pytest.raises(
        ValueError, match="needs --data, its official files, or the Hub's .*/test4.jsonl, which"
    ) as caught:
        load_task("livecodebench")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_hub_is_one_sentence():
    with pytest.raises(
        ValueError, match="needs --data, .*code_generation_lite/test.jsonl, which can't be loaded"
    ) as caught:
        load_task("livecodebench")
    assert "\n" not in str(caught.value)


def test_broken_files_are_named(write, tmp_path):
    good = row(1, "2025-03-01")
    for rows, message in [
        ((), "lcb.jsonl holds no problem"),
        ((good, "{not json"), "lcb.jsonl, line 2 is not JSON"),
        ((good, json.dumps(good)[:-9]), "lcb.jsonl, line 2 is not JSON"),
        ((good, "[1]"), "line 2 is not a JSON object"),
        (
            (good, {k: v for k, v in good.items() if k != "starter_code"}),
            "lcb.jsonl, line 2: starter_code must be",
        ),
        (
            (good, row(2, "2025-03-01", private_test_cases="oops")),
            "line 2: its tests can't be decoded",
        ),
        ((good, row(2, "2025-03-01", private_test_cases="[]")), "line 2: it has no hidden tests"),
        (
            (good, row(2, "2025-03-01", private_test_cases=5)),
            "line 2: private_test_cases must be given, as text",
        ),
        (
            (good, row(2, "2025-03-01", starter_code=5)),
            "line 2: starter_code must be given, as text",
        ),
        (
            (row(1, "2025-03-01", question_content=["a"]),),
            "line 1: question_content must be given, as text",
        ),
        ((row(1, "2025-03-01", question_id=1),), "line 1: question_id must be given, as text"),
        ((good, row(2, "2025-03-01", metadata="[]")), "line 2: its metadata is no JSON object"),
        ((good, row(2, "2025-03-01", metadata="[" * 10**5)), "line 2: maximum recursion depth"),
        (
            (good, row(2, "2025-03-01", public_test_cases="[" * 10**5)),
            "line 2: its tests can't be decoded: Recursion",
        ),
        (
            (good, "", "", row(2, "2025-03-01", private_test_cases="oops")),
            "line 4: its tests can't be decoded",
        ),
        ((good, "", {**row(2, "2025-03-01"), "metadata": None}), "line 3: metadata must be given"),
        ((good, '{"a": "\udcff"}'), "lcb.jsonl, line 2 is not JSON: 'utf-8' codec can't decode"),
        ((good, "", good), "line 3 repeats the question_id 'q1' of .*lcb.jsonl, line 1"),
        (
            (good, row(2, "yesterday")),
            "line 2: its contest_date 'yesterday.*' is no day like 2025-02-01",
        ),
        ((good, row(2, "2025-02-30")), "line 2: its contest_date '2025-02-30.*' is no day like"),
        ((json.dumps([good, good]),), "line 1 is not a JSON object"),
        ((json.dumps(good, indent=1),), "line 1 is not JSON"),
        (
            (
                good,
                row(
                    2, "2025-03-01", True, private_test_cases='[{"input": "1\\nx", "output": "1"}]'
                ),
            ),
            "line 2: test 2 of double is not JSON, line by line",
        ),
        (
            (good, row(2, "2025-03-01", metadata='{"func_name": 5}')),
            "line 2: the function's name 5 must be a text",
        ),
        (
            (good, row(2, "2025-03-01", metadata='{"func_name": "a b"}')),
            "line 2: no function can have the name 'a b'",
        ),
        (
            (good, row(2, "2025-03-01", question_content="\ud83d")),
            "line 2: 'question_content' holds half a surrogate",
        ),
        (
            (
                good,
                row(
                    2, "2025-03-01", private_test_cases=packed([{"input": "\ud83d", "output": "1"}])
                ),
            ),
            "line 2: 'extra' holds half a surrogate pair",
        ),
        (
            (row(1, "2024-01-02"), row(2, "2024-03-04")),
            "contests of 2024-01-02 to 2024-03-04: none to evaluate with",
        ),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load_task("livecodebench", data=write(*rows))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="needs --data.*nowhere is none"):
        load_task("livecodebench", data="nowhere")
    with pytest.raises(ValueError, match="no protocol 'magic'"):
        load_task("livecodebench", data="nowhere", protocol="magic")
    with pytest.raises(ValueError, match="not as 2025-02-30 to 2025-05-01: day is out of range"):
        load_task("livecodebench", data=write(good), since="2025-02-30")
    with pytest.raises(ValueError, match="none to train on with protocol older"):
        load_task("livecodebench", data=write(good), protocol="older")
    bare = row(2, "2025-03-01", public_test_cases="[]")  # judged by its hidden tests elsewhere
    assert len(load_task("livecodebench", dev=0, data=write(good, bare)).train) == 2
    with pytest.raises(ValueError, match="line 2: it has no public tests"):
        load_task("livecodebench", data=write(good, bare), protocol="official")


@runs_code
def test_code_in_a_file_of_your_own(tmp_path):
    mine = {"id": "1", "prompt": "Double.", "verifier": "code", "inputs": ["2"], "outputs": ["4"]}
    (tmp_path / "t.jsonl").write_text(json.dumps(mine) + "\n")
    (problem,) = read_problems(tmp_path / "t.jsonl")
    assert verify(problem, "```\nprint(2 * int(input()))\n```").reward == 1
    for changes in ({"inputs": []}, {"outputs": ["4", "5"]}, {"inputs": [2]}, {"inputs": "2"}):
        (tmp_path / "t.jsonl").write_text(json.dumps({**mine, **changes}) + "\n")
        with pytest.raises(ValueError, match="t.jsonl, line 1: code needs inputs and outputs"):
            read_problems(tmp_path / "t.jsonl")
    for changes, message in (
        ({"fn_name": 5}, "the function's name 5 must be a text"),
        ({"fn_name": "f", "inputs": ["2\nx"]}, "test 1 of f is not JSON, line by line"),
        ({"fn_name": "f", "outputs": ["x"]}, "test 1 of f is not JSON"),
        ({"fn_name": "a.b"}, "no function can have the name 'a.b'"),
        ({"fn_name": "class"}, "no function can have the name 'class'"),
        ({"inputs": ["x" * (DISK + 1)]}, f"an input of {DISK + 1} bytes is too large"),
    ):
        (tmp_path / "t.jsonl").write_text(json.dumps({**mine, **changes}) + "\n")
        with pytest.raises(ValueError, match=f"t.jsonl, line 1: {message}"):
            read_problems(tmp_path / "t.jsonl")


SHARED = HERE.parent / "shared" / "data" / "livecodebench" / "sample.jsonl"


@runs_code
@pytest.mark.skipif(
    not SHARED.is_file(), reason="the LiveCodeBench sample is not part of this repository"
)
def test_the_sample():
    """Every problem, its tests as a program that knows them by heart: passes; the same program
    without one test fails it.
    """
    task = load_task(
        "livecodebench", dev=0, data=str(SHARED), since="2023-05-01", until="2024-03-01"
    )
    assert (
        len(task.train) == len(task.test) == 90
        and sum(p.extra["fn_name"] is not None for p in task.test) == 45
    )
    for test, train in list(zip(task.test, task.train, strict=True))[::6]:
        right, wrong = by_heart(test), by_heart(test, forget=test.extra["inputs"][-1])
        assert verify(test, right).reward == 1 and verify(train, right).reward == 1
        found = verify(test, wrong)
        assert found.reward == 0 and found.feedback == "" and 0 < found.test_pass_rate < 1


def by_heart(problem, forget=None):
    tests = problem.extra
    table = {i: o for i, o in zip(tests["inputs"], tests["outputs"], strict=True) if i != forget}
    if tests["fn_name"]:
        known = {
            json.dumps([json.loads(x) for x in i.split("\n")]): json.loads(o)
            for i, o in table.items()
        }
        return (
            f"```python\nimport json\ndef {tests['fn_name']}(*a): return"
            f" {known!r}.get(json.dumps(list(a)), 'no')\n```"
        )
    return f"```python\nimport sys\nprint({table!r}.get(sys.stdin.read(), 'forgotten'))\n```"


# -- multiple choice, leniently


@pytest.mark.parametrize(
    "text, lenient",
    [
        ("<answer>B</answer>", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("\\boxed{B}", "B"),
        ("B.", "B"),
        ("B: 1.4", "B"),
        ("<answer>\n(b)\n</answer>", "B"),
        ("<answer>\\boxed{\\text{B}}</answer>", "B"),
        ("B) barium", "B"),
        ("The answer is B", "B"),
        ("I thought of A. The correct answer is **B**.", "B"),
        ("<answer>option B</answer>", "B"),
        ("so \\boxed{A}, no, \\boxed{B}", "B"),
        ("**B)** 1.4", "B"),
        ("A", "A"),
        ("<answer>C: not B</answer>", "C"),
        ("(C)", "C"),
        ("", ""),
        ("answer: b", "B"),
        ("The answer is b.", "B"),
        ("B is the answer", "B"),
        ("B, since the ions", "B"),
        ("B is the right answer, A is not", "B"),
        ("\\boxed{\\textbf{(B)}}", "B"),
        ("$\\boxed{\\mathrm{B}}$", "B"),
        ("B - barium", "B"),
        ("A: chloride is wrong. The answer is B", "B"),
        ("option A is wrong, so option B", "B"),
        ("A. is wrong; answer (B).", "B"),
        ("Not B, answer", "Not B, answer"),
        ("The answer is not B", "The answer is not B"),
        ("The answer is a protein", "The answer is a protein"),
        ("The answer is B or C", "The answer is B or C"),
        ("\\boxed{A} or \\boxed{B}", "\\boxed{A} or \\boxed{B}"),
        ("B) or C)", "B) or C)"),
        ("A, B", "A, B"),
        ("Option B is wrong", "Option B is wrong"),
        ("Because of the ions.", "Because of the ions."),
        ("B or C", "B or C"),
        ("A protein", "A protein"),
    ],
)
def test_a_lenient_reading(text, lenient):
    problem = Problem("1", "p", "B", "choice")
    found = verify(problem, text, lenient=True)
    assert (found.answer, found.reward) == (lenient, float(lenient == "B"))
    assert (
        verify(problem, text).reward <= found.reward
        and found.feedback == verify(problem, text).feedback == ""
    )


SAYS_B = [  # as models write it; the correction counts above all
    "B",
    "b",
    "(B)",
    "**B**",
    "\\boxed{B}",
    "B.",
    "B: 1.4",
    "\\boxed{\\text{B}}",
    "B) barium",
    "The answer is B",
    "option B",
    "It's B.",
    "It’s B.",
    "My pick: B",
    "Ｂ",
    "（Ｂ）",
    "答案：B",
    "答案是B",
    "答案是B选项",
    "正确答案为B。",
    "选B",
    "我选择B。",
    "故选：B",
    "应选B",
    "A. No wait, B.",
    "A... wait, no, B",
    "A. Actually, it's B.",
    "A. Sorry, B",
    "The answer is A. Correction: B",
    "I first thought A, but the answer is B",
    "The answer isn't A, it's B",
    "not A but B",
    "It is B, since the ions",
    "I'd go with B",
    "I choose B over C",
    "My answer would be B",
    "The answer must be B",
    "The answer should be option B",
    "Answer = B",
    "Final answer: B",
    "Final: B",
    "Because of the ions.\nB",
    "B\n\nBecause of the ions.",
    "B because of ions",
    "B it is",
    "B is correct",
    "B is right, A is wrong",
    "A is wrong, B is right",
    "Definitely B",
    "I think it's B.",
    "I think B",
    "So B.",
    "therefore, B",
    "A is wrong, so B.",
    "The answer is B and I am sure",
    "The answer is B and not C",
    "Answer B",
    "ANSWER: B",
    "Letter B",
    "the letter B",
    "[B]",
    '"B"',
    "'B'",
    "B!",
    "B?",
    "$B$",
    "\\(B\\)",
    "Not A. The answer is B",
    "answer: b",
    "The answer is b.",
    "A? No, B.",
    "A, no, B",
    "A – no: B",
    "A: chloride is wrong. The answer is B",
    "B: Vitamin C.",
    "B: 25 °C",
    "option A is wrong, so option B",
    "The right choice is B, not A",
    "I would select B",
    "A. On second thought, B.",
    "I mean B",
    "A. I mean B.",
    "Between A and B, I pick B",
    "B, not A",
    "选项B",
    "答案应该是 B",
    "A。不对，应该选B",
    "B、因为",
    "<b>B</b>",
    "- B",
    "> B",
    "The correct option is:\n\nB",
    "B. Wait, is A possible? No, B.",
    "I'm confident it's B.",
    "That is B.",
    "→ B",
    "answer is => B",
    'The answer is "B".',
    "The best answer is (B)",
    "The answer's B",
    "we get option (B).",
    "Answer is clearly B.",
    "I am going with B",
    "選B",
    "應該選B",
    "答えはB",
    "正解はBです",
    "La réponse est B",
    "Die Antwort ist B",
    "La respuesta es B",
    "A resposta é B",
    "Ответ: B",
    "B rather than A",
    "B instead of A",
    "B must be correct",
    "B would be the answer",
    "B seems right",
    "B seems to be correct",
    "Looks like B.",
    "Hmm, B",
    "B (the second one)",
    "B选项",
    "B選項",
    "_B_",
    "__B__",
    "___B___",
    "_(B)_",
    "**_B_**",
    "_B._",
    "The answer is _B_.",
    "_The answer is B_",
    "_A_. No wait, _B_.",
    "答案是_B_",
]
SAYS_NOTHING = [  # denials, and two letters of which none is chosen
    "not A",
    "A or B",
    "A and B",
    "A/B",
    "A, B",
    "Not B",
    "The answer is not B",
    "B or C",
    "Option B is wrong",
    "B is wrong",
    "B is incorrect",
    "It isn't B",
    "It's not B",
    "It's A or B",
    "either A or B",
    "Both A and B",
    "neither A nor B",
    "None of the above",
    "The answer is B or C",
    "The answer is A/B",
    "answer: A, B",
    "A protein",
    "The answer is a protein",
    "Not option B",
    "It can't be option B",
    "rule out option B",
    "eliminate B",
    "I don't know",
    "answer: I don't know",
    "",
    "AB",
    "A & B",
    "A+B",
    "vitamin C",
    "A. No wait, that's wrong.",
    "Anything but B?",
    "all of them",
    "A) chloride: wrong. B) nitrate: right.",
    "B, C",
    "A; B",
    "A vs. B",
    "The answer isn't B",
    "I would not pick B",
    "B isn't the answer",
    "B is not the answer",
    "不是B",
    "答案不是B",
    "A B",
    "I cannot choose option B",
    "B (or C)",
    "B would be wrong",
    "B seems not right",
    "A (B)",
    "_A_ or _B_",
    "not _B_",
    "x_B",
    "B_2",
]


@pytest.mark.parametrize("text", SAYS_B)
def test_lenient_reads_what_a_person_reads(text):
    for reply in (text, f"<reasoning>A? C? D?</reasoning>\n<answer>\n{text}\n</answer>"):
        found = verify(Problem("1", "p", "B", "choice"), reply, lenient=True)
        assert (found.answer, found.reward) == ("B", 1)
        assert verify(Problem("1", "p", "A", "choice"), reply, lenient=True).reward == 0


@pytest.mark.parametrize("text", SAYS_NOTHING)
def test_lenient_takes_no_letter_that_a_person_would_not(text):
    found = [verify(Problem("1", "p", key, "choice"), text, lenient=True) for key in "ABCDEFGHI"]
    assert [v.reward for v in found] == [0] * 9 and {v.answer for v in found} == {text}


@settings(deadline=None)
@given(st.text(max_size=40), st.sampled_from(["A", "b", "Paris", "A or B", "not A"]))
def test_lenient_takes_all_that_strict_takes(text, key):
    for reply in (key, f"<answer>{key}", f"{text}<answer>{key}</answer>{text}", text):
        problem = Problem("1", "p", key, "choice")
        strict, lenient = verify(problem, reply), verify(problem, reply, lenient=True)
        assert strict.reward <= lenient.reward and (not strict.reward or lenient.answer == key)


@pytest.mark.parametrize(
    "text",
    [
        "answer" + " " * 10**5 + "1",
        "answer " + "." * 10**5,
        "answer b" * 20_000,
        "or " * 50_000,
        "\\boxed{" * 50_000,
        "B is the " * 20_000,
        "_" * 10**5,
        "_B_" * 30_000,
        "." * 10**5 + "B" + "." * 10**5 + "x",
    ],
)
def test_a_lenient_reading_takes_linear_time(text):
    start = time.process_time()
    verify(Problem("1", "p", "B", "choice"), text, lenient=True)
    assert time.process_time() - start < 0.5


def test_lenient_concerns_multiple_choice_alone():
    assert verify(Problem("1", "p", "7", "last_number"), "7 of 9", lenient=True).reward == 0


def test_reading_pickles_of_strings_alone():
    from tasks.livecodebench import Strings

    assert Strings(io.BytesIO(pickle.dumps("x" * 10))).load() == "x" * 10
