"""The tasks of reasoning-gym, made by its generators: `--task gym/NAME`, without a download.

Some of its scorers hand an answer to Python's eval, or to sympy's parser, which evaluates too.
What a model wrote is hostile, so that such an answer has to pass `is_safe` first.
"""

import ast
import functools
import random
import re
import threading

from tqdm import tqdm

from tasks.problem import Problem, Verdict, shown

TRAIN, TEST = 1000, 200  # problems [ours]
# Problem n of a generator is made by seed + n: seeds side by side would give the same problems
SEEDS = {"train": 1, "test": 1_000_001}
SECONDS = 5  # of one scorer, by SIGALRM, in the main thread alone
SYSTEM = (
    "Think step by step. Write the final answer, and nothing else, between <answer> and </answer>."
)
# Tasks whose scorer evaluates the answer; a test reads the library's source for others
EVALUATES = {
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
}
# Their problems or keys differ with PYTHONHASHSEED, so from process to process
UNREPEATABLE = {
    "codeio",
    "intermediate_integration",
    "isomorphic_strings",
    "knight_swap",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
}
# Their scorers take wrong answers for right: any text for an end, 0 for the chance 0.25
MISJUDGED = {"coin_flip", "game_of_life_halting"}
UNSIGNED = {"gsm_symbolic"}  # their scorers read past a minus sign
FUNCTIONS = {"sqrt", "exp", "log", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh"}
GROWING = {"exp", "sinh", "cosh"}  # of a number alone they are never needed, and can be endless
# coin_flip reads with fractions.Fraction, which writes 1e9999999 out and can't be interrupted
LONG_EXPONENT = re.compile(r"[eE][+,-]*\d[\d_,]{3,}")
NEGATIVE = re.compile(r"[-\u2212]\s*\d")
# A number that nothing is far from: some scorers take it for any
NOT_A_NUMBER = re.compile(r"(?i)(?<![a-z])nan[ij]?(?![a-z])")
VALUES = (ast.Expression, ast.List, ast.Tuple, ast.UnaryOp, ast.USub, ast.UAdd, ast.Load)
ARITHMETIC = (ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)


def library():
    """Returns reasoning-gym, which takes seconds to import."""
    import reasoning_gym

    return reasoning_gym


def load_gym(name) -> tuple[list, list, str]:
    """Makes the train and test problems of `gym/NAME`, and says so.

    A question of test is not asked in train. Raises ValueError if there is no such task, if its
    problems would differ between the processes of a run, or if its scorer takes wrong answers.
    """
    task = name.removeprefix("gym/")
    known = library().factory.DATASETS
    if task not in known:
        raise ValueError(f"--task {name}: reasoning-gym has {', '.join(sorted(known))}")
    if task in UNREPEATABLE:
        raise ValueError(
            f"--task {name} makes other problems or keys in each process, so that no run of it can"
            " be resumed or shared by ranks; take another"
        )
    if task in MISJUDGED:
        raise ValueError(
            f"--task {name} has a scorer that takes wrong answers for right; take another"
        )
    made, state = {}, random.getstate()
    for split, size in (("test", TEST), ("train", TRAIN)):
        random.seed(SEEDS[split])  # some generators draw from the global one
        try:
            made_one_by_one = library().create_dataset(task, size=size, seed=SEEDS[split])
            bar = {"desc": f"{name} {split}", "leave": False, "disable": None}
            entries = [made_one_by_one[n] for n in tqdm(range(size), **bar)]
        except Exception as error:  # whatever a generator raises
            raise ValueError(f"--task {name} can't be made ({error}); take another") from error
        finally:
            random.setstate(state)
        asked = {p.prompt for p in made.get("test", [])}
        made[split] = []
        for n, entry in enumerate(entries):
            question = entry["question"].strip()
            if question in asked:
                continue
            asked.add(question)
            extra = {"task": task, "entry": entry}
            answer = str(entry["answer"])
            made[split].append(
                Problem(f"{split}-{n}", question, answer, "gym", system=SYSTEM, extra=extra)
            )
    sizes = f"{len(made['train'])} to train on and {len(made['test'])} to test"
    return made["train"], made["test"], f"{name}: {sizes} were made by reasoning-gym, none twice"


def refuse_unscorable(task, entry, answer):
    """Looks at a problem of a file: its task, its entry as reasoning-gym has it, and its key.

    Raises ValueError, in one sentence, if no scorer is known, if that of the task takes wrong
    answers for right, or if it can't read the entry.
    """
    known = library().factory.DATASETS
    if not isinstance(task, str) or task not in known:
        raise ValueError(
            f"no task {shown(task)} of reasoning-gym, which has {', '.join(sorted(known))}"
        )
    if task in MISJUDGED:
        raise ValueError(f"{task} has a scorer that takes wrong answers for right; take another")
    if not isinstance(entry, dict) or "answer" not in entry:
        raise ValueError(f"the entry {shown(entry)} is no object with an answer")
    if str(entry["answer"]) != answer:
        raise ValueError(f"the answer {shown(answer)} is not its entry's, {shown(entry['answer'])}")
    metadata = entry.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"the entry's metadata {shown(metadata)} is no object")
    if not isinstance(metadata.get("valid_answers") or [], list):
        raise ValueError(
            f"the entry's valid_answers {shown(metadata['valid_answers'])} are no list"
        )
    if misleads(task, answer):
        return
    try:  # no scorer fails on the key of an entry that it can read
        scorer_of(task)(answer, entry)
    except Exception as error:  # whatever a scorer raises
        kind, why = type(error).__name__, shown(str(error))
        raise ValueError(f"the scorer of {task} can't judge the entry: {kind} {why}") from error


def verify_gym(problem, completion) -> Verdict:
    """Judges what stands in the last <answer>, or else the whole reply, by the task's scorer.

    The key itself is right in the form that the question asks for. A score between 0 and 1 is a
    reward as it stands. What takes a scorer longer than SECONDS is wrong.
    """
    from math_verify.errors import TimeoutException  # sympy takes a second
    from math_verify.utils import timeout

    answer = completion.split("<answer>")[-1].split("</answer>")[0].strip()
    task, entry = problem.extra["task"], problem.extra["entry"]
    if answer in keys_of(entry):
        return Verdict(1.0, problem.answer)
    if not answer or misleads(task, answer):
        return Verdict(0.0, answer[:200])
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a scorer of reasoning-gym can be interrupted in the main thread alone")
    scorer = scorer_of(task)  # out of the try: a task that has none is no fault of the answer
    try:
        score = timeout(SECONDS)(scorer)(answer, entry)
    except (Exception, TimeoutException):  # a scorer that fails on what a model wrote
        score = 0.0
    right = score >= 1
    return Verdict(min(1.0, max(0.0, float(score))), problem.answer if right else answer[:200])


def misleads(task, answer) -> bool:
    """Says whether the task's scorer would run an answer, never end with it, or take it wrongly."""
    if NOT_A_NUMBER.search(answer):
        return True
    if task == "coin_flip":
        return bool(LONG_EXPONENT.search(answer))
    if task in UNSIGNED:
        return bool(NEGATIVE.search(answer))
    return task in EVALUATES and not is_safe(answer)


def keys_of(entry) -> list[str]:
    """Returns the texts that are right as they stand: a problem of n_queens has several."""
    keys = [*(entry.get("metadata", {}).get("valid_answers") or []), entry["answer"]]
    return [key.strip() for key in keys if isinstance(key, str) and key.strip()]


@functools.cache
def scorer_of(task):
    return library().get_score_answer_fn(task)


def is_safe(text) -> bool:
    """Says whether a text is a plain value or arithmetic, with powers up to 20.

    Names are single letters and FUNCTIONS. Nothing else is called, no attribute is read, and no
    text is longer than a character: sympy would parse it again.
    """
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return len(nodes) < 500 and all(map(is_plain, nodes))


def is_plain(node) -> bool:
    """Says whether a node of Python's grammar is harmless."""
    if isinstance(node, ast.Name):
        return len(node.id) == 1 or node.id in FUNCTIONS
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
        if not named or node.keywords or holds(node.args, ast.Call):
            return False
        return node.func.id not in GROWING or holds(node.args, ast.Name)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return len(node.value) == 1
        return isinstance(node.value, (int, float)) and abs(node.value) < 1e12
    if isinstance(node, ast.BinOp):
        sides = [node.left, node.right]
        if holds(sides, (ast.List, ast.Tuple)) or holds_text(sides):
            return False  # [0] * 5000000000 takes all memory
        if isinstance(node.op, ast.Pow):
            return is_small(node.right) and not holds([node.left], ast.Pow)
    return isinstance(node, VALUES + ARITHMETIC)


def is_small(exponent) -> bool:
    """Says whether an exponent is a number up to 20, or a ratio of two, with any sign."""
    while isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    parts = [exponent]
    if isinstance(exponent, ast.BinOp) and isinstance(exponent.op, ast.Div):
        parts = [exponent.left, exponent.right]
    numbers = [p.operand if isinstance(p, ast.UnaryOp) else p for p in parts]
    values = [n.value for n in numbers if isinstance(n, ast.Constant)]
    if len(values) < len(parts) or not all(isinstance(v, (int, float)) for v in values):
        return False
    return max(values) <= 20 and all(divisor >= 1 for divisor in values[1:])


def holds_text(nodes) -> bool:
    """Says whether a constant within is a text."""
    inner = [n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Constant)]
    return any(isinstance(n.value, str) for n in inner)


def holds(nodes, kind) -> bool:
    """Says whether a node of that kind, or of one of those kinds, is within others."""
    return any(isinstance(inner, kind) for node in nodes for inner in ast.walk(node))
