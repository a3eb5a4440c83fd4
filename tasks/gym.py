"""The tasks of reasoning-gym, made by its generators: `--task gym/NAME`, without a download.

Some of its scorers hand an answer to Python's eval, or to sympy's parser, which evaluates too.
What a model wrote is hostile, so that such an answer has to pass `is_safe` first.
"""

import ast
import functools

from tqdm import tqdm

from tasks.problem import Problem, Verdict

TRAIN, TEST = 1000, 200  # problems [ours]
SEEDS = {"train": 1, "test": 2}
SYSTEM = (
    "Think step by step. Write the final answer, and nothing else, between <answer> and </answer>."
)
# Tasks whose scorer evaluates the answer; a test reads the library's source for others
EVALUATES = {
    "binary_matrix",
    "codeio",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
}
FUNCTIONS = {"sqrt", "exp", "log", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh"}
VALUES = (ast.Expression, ast.List, ast.Tuple, ast.UnaryOp, ast.USub, ast.UAdd, ast.Load)
ARITHMETIC = (ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)


def library():
    """Returns reasoning-gym, which takes seconds to import."""
    import reasoning_gym

    return reasoning_gym


def load_gym(name) -> tuple[list, list, str]:
    """Makes the train and test problems of `gym/NAME`, and says so.

    A question of test is not asked in train. Raises ValueError if there is no such task.
    """
    task = name.removeprefix("gym/")
    known = library().factory.DATASETS
    if task not in known:
        raise ValueError(f"--task {name}: reasoning-gym has {', '.join(sorted(known))}")
    made = {}
    for split, size in (("test", TEST), ("train", TRAIN)):
        try:
            made_one_by_one = library().create_dataset(task, size=size, seed=SEEDS[split])
            bar = {"desc": f"{name} {split}", "leave": False, "disable": None}
            entries = [made_one_by_one[n] for n in tqdm(range(size), **bar)]
        except Exception as error:  # whatever a generator raises
            raise ValueError(f"--task {name} can't be made ({error}); take another") from error
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


def verify_gym(problem, completion) -> Verdict:
    """Judges what stands in the last <answer>, or else the whole reply, by the task's scorer.

    A score between 0 and 1 is a reward as it stands.
    """
    answer = completion.split("<answer>")[-1].split("</answer>")[0].strip()
    task = problem.extra["task"]
    if not answer or task in EVALUATES and not is_safe(answer):
        return Verdict(0.0, answer[:200])
    try:
        score = scorer_of(task)(answer, problem.extra["entry"])
    except Exception:  # a scorer that fails on what a model wrote
        score = 0.0
    right = score >= 1
    return Verdict(min(1.0, max(0.0, float(score))), problem.answer if right else answer[:200])


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
        return named and not node.keywords and not holds(node.args, ast.Call)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return len(node.value) == 1
        return isinstance(node.value, (int, float)) and abs(node.value) < 1e12
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        exponent = node.right.value if isinstance(node.right, ast.Constant) else None
        small = isinstance(exponent, (int, float)) and exponent <= 20
        return small and not holds([node.left], ast.Pow)
    return isinstance(node, VALUES + ARITHMETIC)


def holds(nodes, kind) -> bool:
    """Says whether a node of that kind is within others."""
    return any(isinstance(inner, kind) for node in nodes for inner in ast.walk(node))
