r"""Answers that are mathematics, judged by math-verify: \boxed{1/2} is 0.5.

It reads LaTeX with a grammar and compares with sympy, and runs nothing of a model's text.
"""

import logging

from tasks.problem import Verdict

# seconds of one comparison: a tower of powers would never end. By SIGALRM, in the main thread alone
SECONDS = 5
MAX_TEXT = 4000  # characters of a completion that are read, its last ones


def verify_math(problem, completion) -> Verdict:
    """Judges the last mathematical expression of a completion, or the one in \\boxed{}.

    What equals the key as mathematics is right, whatever its form. What takes longer than SECONDS
    is wrong.
    """
    import math_verify  # sympy takes a second

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # its timeouts are verdicts here
    limits = {"parsing_timeout": SECONDS}
    key = math_verify.parse(f"\\boxed{{{problem.answer}}}", **limits)
    said = math_verify.parse(completion[-MAX_TEXT:], **limits)
    if not said:
        return Verdict(0.0, "")
    if math_verify.verify(key, said, timeout_seconds=SECONDS):
        return Verdict(1.0, problem.answer)
    return Verdict(0.0, str(said[-1])[:200])


def key_of(text) -> str:
    r"""Returns the answer that a worked solution ends with: in \boxed{}, or after ####.

    A text with neither is its own answer.
    """
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "")
    start = text.rfind("\\boxed{")
    if start < 0:
        return text.strip()
    depth, begin = 0, start + len("\\boxed{")
    for at in range(begin, len(text)):
        if text[at] == "}" and not depth:
            return text[begin:at].strip()
        depth += (text[at] == "{") - (text[at] == "}")
    return text[begin:].strip()
