"""What a problem's reference solution and answer are, for the methods whose teachers read them."""

from tasks.problem import shown


def hidden_rules(problem) -> list[str]:
    """Gives the hidden operations of a problem of nano, one a step; none for any other problem."""
    return problem.extra.get("hidden", "").split() if problem.verifier == "steps" else []


def reference(problem) -> str:
    """Gives the reference solution: nano's answer with its operations, else the field `reference`.

    Raises ValueError if the problem has none.
    """
    text = reference_or_nothing(problem)
    if not text:
        raise ValueError(
            f"problem {problem.id} has no reference solution, which the teacher of this method"
            " reads; add a field `reference` to the rows of the task"
        )
    return text


def reference_or_nothing(problem) -> str:
    rules = hidden_rules(problem)
    if not rules:
        text = problem.extra.get("reference", "")
        if not isinstance(text, str):
            raise ValueError(
                f"problem {problem.id} has the reference {shown(text)}, which is no text; write it"
                " as one"
            )
        return text
    text = problem.answer
    for rule in rules:
        text = text.replace(rule.split("=")[0] + "=*", rule)
    return text


def short_answer(problem) -> str:
    """Gives the answer that a text can be checked against; "" where programs are run on tests."""
    return "" if problem.verifier == "code" else problem.answer


def on_nano(rollouts) -> bool:
    """Says whether rollouts are of one of nano's worlds, whose hidden operations can be told."""
    return all(hidden_rules(r.problem) for r in rollouts)
