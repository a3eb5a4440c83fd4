"""Data of one's own: tables with the usual columns, mathematics, and reasoning-gym."""

import csv
import inspect
import json
import random
import re
import time

import pytest

import pmd
from runtime.metrics import memory_precision
from tasks import gym, load_task, verify
from tasks.gym import EVALUATES, MISJUDGED, SEEDS, TRAIN, UNREPEATABLE, is_safe, library
from tasks.maths import key_of
from tasks.problem import Problem
from tasks.reading import read_problem, read_problems
from tasks.references import reference
from tasks.table import held_out, problem_of
from tasks.verdicts import verify_all

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(40)]


def written(folder, kind):
    """The same rows in a file of each kind."""
    path = folder / f"sums{kind}"
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == ".json":
        path.write_text(json.dumps([{**row, "answer": int(row["answer"])} for row in ROWS]))
    elif kind == ".csv":
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, ["question", "answer"])
            table.writeheader()
            table.writerows(ROWS)
    else:
        import pandas

        pandas.DataFrame(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_of_the_usual_columns_is_a_task(tmp_path, kind):
    task = load_task(str(written(tmp_path, kind)))
    assert (len(task.train), len(task.dev), len(task.test)) == (32, 4, 4)
    asked = [p.prompt for p in task.train + task.dev + task.test]
    assert sorted(asked) == sorted(row["question"] for row in ROWS)
    assert "no test split: 4 of its questions were held out" in task.card
    for p in task.test:
        a = int(re.search(r"\d+", p.prompt)[0])
        assert verify(p, f"So it is \\boxed{{{2 * a}}}").reward == 1
        assert verify(p, f"So it is \\boxed{{{2 * a + 1}}}").reward == 0


def test_all_kinds_of_files_give_the_same_split(tmp_path):
    tests = []
    for kind in (".jsonl", ".json", ".csv", ".parquet"):
        tests.append([p.prompt for p in load_task(str(written(tmp_path, kind))).test])
    assert tests[0] == tests[1] == tests[2] == tests[3]


def test_a_model_that_knows_no_word_of_the_problems_is_named(tmp_path, make_config):
    cfg = make_config(task=str(written(tmp_path, ".jsonl")))
    said = pmd.check(cfg)[0].card
    assert re.search(r"nano does not know \d+% of the words of these problems", said)
    assert "does not know" not in pmd.check(make_config())[0].card


def test_a_question_that_stands_twice_is_on_one_side():
    twice = [problem_of(row, f"{n}-{i}") for i in range(2) for n, row in enumerate(ROWS)]
    train, test = held_out(twice)
    assert not {p.prompt for p in train} & {p.prompt for p in test} and len(test) == 8


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"problem": "q", "solution": "so \\boxed{\\frac{1}{2}} it is"}, ("q", "\\frac{1}{2}")),
        ({"problem": "q", "solution": "work", "answer": "7"}, ("q", "7")),
        ({"question": "q", "answer": "1 + 1 = 2\n#### 1,200"}, ("q", "1200")),
        ({"prompt": [{"role": "user", "content": "q"}], "answer": 3}, ("q", "3")),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "4"}]},
            ("q", "4"),
        ),
    ],
)
def test_columns_are_found_by_name(row, wanted):
    problem = problem_of(row, "a")
    assert (problem.prompt, problem.answer) == wanted and problem.verifier == "math"


@pytest.mark.parametrize(
    "row, why",
    [
        ({"text": "q"}, "no question: it needs one of question, problem, prompt and messages"),
        ({"question": "q", "answer": " "}, "answer must be given"),
        ({"messages": [{"role": "user", "content": "q"}] * 2, "answer": 1}, "one turn"),
        ({"question": "q", "answer": "7", "verifier": "none"}, "no verifier 'none'"),
        ({"question": "q", "answer": [1, 2]}, "is no text or number; write it as text"),
        ({"question": "q", "answer": True}, "is no text or number; write it as text"),
        ({"question": "q", "answer": float("nan")}, "the answer nan is no text or number"),
        ({"question": "q", "answer": float("inf")}, "the answer inf is no text or number"),
        ({"question": "q", "answer": b"7"}, "the answer b'7' is no text or number"),
        ({"question": {"text": "q"}, "answer": "7"}, "the question .* is no text or number"),
        ({"question": True, "answer": "7"}, "the question True is no text or number"),
        ({"messages": [{"role": "user", "content": "q"}, "a"], "answer": 1}, "one turn"),
        ({"messages": [{"role": "user", "content": None}], "answer": 1}, "prompt must be given"),
        ({"messages": [{"role": "user", "content": ["q"]}], "answer": 1}, "has to be a text"),
        ({"question": "q", "answer": "7", "verifier": "gym"}, "gym needs task and entry"),
    ],
)
def test_a_row_that_can_not_be_judged_is_refused(row, why):
    with pytest.raises(ValueError, match=why):
        problem_of(row, "a")


def test_a_column_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "sums.csv"
    path.write_text("question,answer,answer\nq,1,2\nr,3,4\n")
    with pytest.raises(ValueError, match="names the column 'answer' twice"):
        load_task(str(path))
    path.write_text("question,answer,,\nq,1,,\nr,3,,\n")  # a spreadsheet's empty columns
    assert len(load_task(str(path), dev=0).train) == 1


def test_a_name_that_is_nowhere_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="no folder, no file and no reachable dataset of the Hub"):
        load_task("nobody/nothing")


def test_a_dataset_with_a_test_split_keeps_it(monkeypatch):
    import datasets

    splits = {"train": ROWS[:30] + ROWS[38:39], "test": ROWS[30:]}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or splits)
    task = load_task("openai/gsm8k:main", dev=0)
    assert asked == [("openai/gsm8k", "main")]
    assert (len(task.train), len(task.test)) == (30, 10)
    assert "1 training questions stand in it and went" in task.card


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_dataset_with_nothing_to_train_on_is_refused(monkeypatch, split):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *names: {split: ROWS})
    with pytest.raises(ValueError, match=f"no split but {split}, and nothing to train on"):
        load_task("openai/gsm8k:main")


@pytest.mark.parametrize("kind", [".csv", ".json"])
def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path, kind):
    path = written(tmp_path, kind)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_task(str(path)).test) == 4


@pytest.mark.parametrize(
    "answer, reply, right",
    [
        ("\\frac{1}{2}", "It is $0.5$.", 1),
        ("0.5", "\\boxed{1/2}", 1),
        ("x^2+2x+1", "\\boxed{(x+1)^2}", 1),
        ("12", "I think 11, no: \\boxed{12}", 1),
        ("12", "\\boxed{21}", 0),
        ("12", "twelve", 0),
        ("12", "", 0),
        ("cat", "\\boxed{act}", 0),
        ("cat", "It is \\boxed{\\text{Cat}}.", 1),
        ("Cat", "cat", 1),
        ("\\text{no}", "\\boxed{on}", 0),
        ("blue whale", "\\boxed{Blue  Whale}", 1),
        ("blue whale", "\\boxed{whale}", 0),
        ("été", "## It\n#### So\n\\boxed{ÉTÉ}", 1),
        ("2ab", "\\boxed{2ab}", 1),
        ("\\frac{ab}{2}", "\\boxed{\\frac{ba}{2}}", 1),
        ("\\sqrt{2}", "\\boxed{2^{1/2}}", 1),
        ("x", "\\boxed{x}", 1),
        ("1e-05", "\\boxed{0.00001}", 1),
        ("1e-05", "It is 1e-5.", 1),
        ("1e-05", "\\boxed{e-5}", 0),
        ("1e-7", "\\boxed{10^{-7}}", 1),
        ("1e+22", "\\boxed{10^{22}}", 1),
        ("1500", "$1.5e3$", 1),
        ("1.5", "It is 1.5e3.", 0),
        ("2e-1", "\\boxed{-1+2e}", 1),
        ("2e-1", "\\boxed{0.2}", 0),
        ("0.0000001", "\\boxed{0.0000002}", 0),
        ("0.0000001", "\\boxed{0.0}", 0),
        ("0.0000123", "\\boxed{1.23 \\times 10^{-5}}", 1),
        ("1.6 \\times 10^{-19}", "\\boxed{1.7 \\times 10^{-19}}", 0),
        ("1.6 \\times 10^{-19}", "\\boxed{1.6e-19}", 1),
        ("\\frac{1}{300}", "\\boxed{0.003333}", 1),
        ("0.05\\%", "\\boxed{0.0005}", 1),
        ("7.", "\\boxed{7}", 1),
        ("7", "\\boxed{7.}", 1),
        ("$1,234.", "\\boxed{1234}", 1),
    ],
)
def test_mathematics_is_compared_as_such(answer, reply, right):
    assert verify(Problem("a", "q", answer, "math"), reply).reward == right


@pytest.mark.slow
def test_a_tower_of_powers_does_not_hold_a_run_up():
    problem, before = Problem("a", "q", "12", "math"), time.perf_counter()
    for reply in (r"\boxed{9^{9^{9^9}}}", r"\boxed{100000000!}", f"${'(' * 900}1{')' * 900}$"):
        assert verify(problem, reply).reward == 0
    assert time.perf_counter() - before < 60


def test_key_of_keeps_nested_braces():
    assert key_of("a \\boxed{1} and \\boxed{\\sqrt{\\frac{a}{b}}} end") == "\\sqrt{\\frac{a}{b}}"


@pytest.mark.parametrize(
    "text, key",
    [
        ("#### 1,234,567.5", "1234567.5"),
        ("#### -1,200", "-1200"),
        ("#### (1,2)", "(1,2)"),
        ("#### 1,2", "1,2"),
        ("#### yes, both", "yes, both"),
    ],
)
def test_key_of_takes_thousands_separators_out_and_no_other_comma(text, key):
    assert key_of(text) == key


@pytest.mark.parametrize(
    "text, key",
    [
        ("We add: $3 + 4 = \\boxed 7$.", "7"),
        ("So \\(\\boxed 12\\), not 13.", "12"),
        ("So $\\boxed {\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("First \\boxed{1}, then $\\fbox{2}$ of 3.", "2"),
        ("No \\boxedness here", "No \\boxedness here"),
    ],
)
def test_key_of_finds_the_box_however_it_is_written(text, key):
    assert key_of(text) == key


def test_looking_for_a_box_takes_linear_time():
    before = time.process_time()
    for part in ("\\boxed ", "\\boxed 1 ", "\\boxed{", "\\fbox", "\\boxed 1" + " " * 50):
        key_of(part * 20_000)
    assert time.process_time() - before < 5


def test_verdicts_keep_their_order_beside_programs():
    problems = [Problem(str(n), "q", str(n), "math") for n in range(3)]
    verdicts = verify_all(problems, ["\\boxed{0}", "\\boxed{5}", "\\boxed{2}"])
    assert [v.reward for v in verdicts] == [1, 0, 1]


def test_reasoning_gym_is_a_task():
    task = load_task("gym/spell_backward")
    asked = [p.prompt for p in task.train + task.dev + task.test]
    assert len(set(asked)) == len(asked) and len(task.test) > 150
    for p in task.test[:20]:
        assert verify(p, f"<answer>{p.answer}</answer>").reward == 1
        assert verify(p, "<answer>no</answer>").reward < 0.5
    again = load_task("gym/spell_backward")
    assert [p.prompt for p in again.train] == [p.prompt for p in task.train]
    with pytest.raises(ValueError, match="reasoning-gym has .*countdown"):
        load_task("gym/chess_by_mail")


def test_hostile_answers_never_reach_an_evaluating_scorer(tmp_path, monkeypatch):
    monkeypatch.setattr(gym, "TRAIN", 10)  # its generator is slow
    monkeypatch.setattr(gym, "TEST", 10)
    mark = tmp_path / "executed"
    hostile = [
        f"__import__('pathlib').Path({str(mark)!r}).touch()",
        f"[open({str(mark)!r}, 'w')]",
        f'sqrt(\'open("{mark}", "w")\')',
        f'exec(\'open("{mark}", "w")\')',
        "().__class__.__bases__[0].__subclasses__()",
        "9**9**9",
        "((9**20)**20)**20",
        "exp(exp(exp(exp(9))))",
        "exp(9999999)",
        "[0]*5000000000",
        "(0,)*5000000000",
        "'a'*5000000000",
        "x**(20/0.001)",
        "[0 for x in y]",
        "lambda: 0",
        "(" * 5000,
    ]
    task = load_task("gym/countdown")
    for text in hostile:
        assert not is_safe(text)
        assert verify(task.test[0], f"<answer>{text}</answer>").reward == 0
    assert not mark.exists()
    for text in (
        "3*(4 + 5) - 7/2",
        "[['Q', '_'], ['_', 'Q']]",
        "x**3/3 + C",
        "-2*sin(x)",
        "12",
        "x**(-3/2)",
    ):
        assert is_safe(text)
    for problem in task.test[:10]:
        assert verify(problem, f"<answer>{problem.answer}</answer>").reward == 1


@pytest.mark.parametrize("task, wrong", [("coin_flip", "0"), ("game_of_life_halting", "?")])
def test_a_task_whose_scorer_takes_wrong_answers_is_refused(task, wrong):
    assert task in MISJUDGED and verify(made(task, 0), f"<answer>{wrong}</answer>").reward == 1
    with pytest.raises(ValueError, match="takes wrong answers for right"):
        load_task(f"gym/{task}")


@pytest.mark.parametrize("task", ["complex_arithmetic", "number_sorting"])
def test_what_is_no_number_is_not_right(task):
    problem = made(task, 0)
    for answer in ("nan", "nan + nani", re.sub(r"\d+(\.\d+)?", "NaN", problem.answer)):
        assert verify(problem, f"<answer>{answer}</answer>").reward == 0


@pytest.mark.parametrize("sign", ["-", "\u2212", "- "])
def test_a_minus_sign_is_read(sign):
    problem = made("gsm_symbolic", 0)
    assert verify(problem, f"<answer>{problem.answer} eggs</answer>").reward == 1
    assert verify(problem, f"<answer>{sign}{problem.answer}</answer>").reward == 0


ENTRY = {"question": "q", "answer": "cba", "metadata": {"sentence": "abc"}}


@pytest.mark.parametrize(
    "changed, why",
    [
        (
            {"task": "chess_by_mail"},
            "no task 'chess_by_mail' of reasoning-gym, which has .*countdown",
        ),
        ({"task": ""}, "no task ''"),
        ({"task": None}, "no task None"),
        ({"task": ["spell_backward"]}, r"no task \['spell_backward'\]"),
        ({"task": "coin_flip"}, "coin_flip has a scorer that takes wrong answers for right"),
        ({"task": "game_of_life_halting"}, "takes wrong answers for right"),
        ({"entry": [ENTRY]}, "the entry .* is no object with an answer"),
        ({"entry": "cba"}, "the entry 'cba' is no object"),
        ({"entry": None}, "the entry None is no object"),
        ({"entry": {"question": "q", "metadata": {}}}, "is no object with an answer"),
        ({"entry": {**ENTRY, "metadata": None}}, "the entry's metadata None is no object"),
        ({"entry": {**ENTRY, "metadata": ["abc"]}}, "metadata .* is no object"),
        ({"entry": {**ENTRY, "metadata": {"valid_answers": 5}}}, "valid_answers 5 are no list"),
        (
            {"task": "word_sorting", "entry": {"question": "q", "answer": "cba", "metadata": {}}},
            "the scorer of word_sorting can't judge the entry: KeyError",
        ),
        ({"task": "composite"}, "the scorer of composite can't judge the entry: "),
        ({"answer": "abc"}, "the answer 'abc' is not its entry's, 'cba'"),
    ],
)
def test_a_row_of_a_file_that_no_scorer_can_judge_is_refused(tmp_path, changed, why):
    row = {"id": "1", "prompt": "q", "answer": "cba", "verifier": "gym"}
    row = {**row, "task": "spell_backward", "entry": ENTRY}
    rows = [row, {**row, "id": "2", **changed}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"t.jsonl, line 2: .*{why}") as caught:
        read_problems(tmp_path / "t.jsonl")
    assert "\n" not in str(caught.value)


def test_a_row_of_a_file_is_judged_by_its_scorer(tmp_path):
    row = {"id": "1", "prompt": "q", "answer": "cba", "verifier": "gym"}
    row = {**row, "task": "spell_backward", "entry": ENTRY}
    entry = {**ENTRY, "metadata": {"valid_answers": None}}  # as Parquet fills what a row lacks
    rows = [row, {**row, "id": "2", "entry": entry}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for problem in read_problems(tmp_path / "t.jsonl"):
        assert verify(problem, "<answer>cba</answer>").reward == 1
        assert verify(problem, "<answer>no</answer>").reward < 0.5


def test_a_task_without_a_scorer_is_no_wrong_answer():
    problem = Problem("a", "q", "7", "gym", extra={"task": "chess_by_mail", "entry": ENTRY})
    with pytest.raises(ValueError, match="the verifier gym failed on problem 'a'"):
        verify(problem, "<answer>6</answer>")


def test_all_scorers_that_evaluate_are_known():
    """By the library's source: which scorers hand anything but their own data to an evaluator."""
    found = set()
    for name, (kind, _) in library().factory.DATASETS.items():
        source = inspect.getsource(kind.score_answer)
        if re.search(r"(?<![\w.])(?:eval|exec)\((?!entry)|(?:parse_expr|sympify)\(", source):
            found.add(name)
    assert found <= EVALUATES | {"number_sorting"}
    assert {"countdown", "n_queens", "puzzle24"} <= found


def made(task, n):
    """Problem n of test."""
    entry = library().create_dataset(task, size=n + 1, seed=SEEDS["test"])[n]
    extra = {"task": task, "entry": entry}
    return Problem(f"{task}-{n}", entry["question"], str(entry["answer"]), "gym", extra=extra)


@pytest.mark.parametrize("task", sorted(EVALUATES))
def test_the_key_of_a_task_that_evaluates_is_right(task):
    for n in range(3):
        problem = made(task, n)
        assert verify(problem, f"<answer>{problem.answer}</answer>").reward == 1


def test_each_solution_of_n_queens_is_right():
    problems = [made("n_queens", n) for n in range(8)]
    several = next(p for p in problems if len(p.extra["entry"]["metadata"]["valid_answers"]) > 1)
    for board in several.extra["entry"]["metadata"]["valid_answers"]:
        assert verify(several, f"<answer>\n{board}\n</answer>").reward == 1
    wrong = several.answer.replace("Q", "_", 1)
    assert verify(several, f"<answer>{wrong}</answer>").reward == 0


def test_an_integral_in_another_form_is_right():
    problem = made("intermediate_integration", 0)
    metadata = {"variable": "x", "integrand": "sqrt(x)"}
    problem.extra["entry"] = {**problem.extra["entry"], "metadata": metadata}
    assert verify(problem, "<answer>C + 2*x**(3/2)/3</answer>").reward == 1
    assert verify(problem, "<answer>C + 2*x**(5/2)/3</answer>").reward == 0


@pytest.mark.parametrize(
    "task, answer",
    [
        ("simple_integration", "(a+b+c+d+f+g+h+x+X+y+Y+z+Z)**20"),
        ("coin_flip", "1e99999999999"),
        ("coin_flip", "1e-9_999,999,999"),
        ("puzzle24", "exp(9999999)"),
    ],
)
def test_no_answer_holds_a_scorer_up(task, answer, monkeypatch):
    monkeypatch.setattr(gym, "SECONDS", 1)
    problem, before = made(task, 0), time.perf_counter()
    assert verify(problem, f"<answer>{answer}</answer>").reward == 0
    assert time.perf_counter() - before < 4


def test_a_scorer_that_never_ends_is_cut_off(monkeypatch):
    def endless(answer, entry):
        while True:
            pass

    monkeypatch.setattr(gym, "SECONDS", 1)
    monkeypatch.setattr(gym, "scorer_of", lambda task: endless)
    assert verify(made("coin_flip", 0), "<answer>7</answer>").reward == 0


@pytest.mark.parametrize("task", sorted(UNREPEATABLE))
def test_a_task_that_no_other_process_makes_again_is_refused(task):
    with pytest.raises(ValueError, match="other problems or keys in each process"):
        load_task(f"gym/{task}")


def test_a_generator_that_draws_from_the_global_state_repeats(monkeypatch):
    monkeypatch.setattr(gym, "TRAIN", 30)
    monkeypatch.setattr(gym, "TEST", 10)
    asked = []
    for seed in (5, 6):
        random.seed(seed)
        before = random.getstate()
        asked.append([p.prompt for p in load_task("gym/list_functions").test])
        assert random.getstate() == before
    assert asked[0] == asked[1]


def test_the_seeds_of_train_and_test_share_no_problem():
    """A generator makes problem n with seed + n."""
    assert abs(SEEDS["train"] - SEEDS["test"]) > TRAIN


@pytest.mark.parametrize("value", [True, "vo=zim", ["vo=zim"], None])
def test_a_column_called_hidden_is_only_kept(value):
    """The operations of nano's problems have that name; no other task's column means them."""
    row = dict(id="a", prompt="How many?", answer="7", verifier="last_number", reference="3 + 4")
    problem = read_problem({**row, "hidden": value})
    assert problem.extra["hidden"] == value
    assert memory_precision(None, [problem]) is None
    assert reference(problem) == "3 + 4"
    if not isinstance(value, str):
        with pytest.raises(ValueError, match="hidden must be text"):
            read_problem({**row, "verifier": "steps", "answer": "1 2", "hidden": value})
