"""Makes the lines of samples.jsonl: a completion, what its teacher had read, and how it pulled.

Which rows a step trains on, and how, the rows say themselves: see pmd.Rollout.
"""

from itertools import pairwise

import torch

from runtime.ranks import gather


def sample_of(step, rows, tokenizer) -> dict:
    """Makes the sample of a step: its first row whose teacher read more than the student, or else
    its first row.

    tokens: the texts of its C tokens. divergence: C numbers in nats, None where it was not
    distilled. advantage: one number or C, None where it was not reinforced. All ranks call this,
    with the same rows, and get the same sample.
    """
    row = next((r for r in rows if r.teacher_prompt or r.teacher_ids), rows[0])
    divergences = [values for values in gather(row.divergence) if values is not None]
    prompt = row.teacher_prompt or tokenizer.decode(row.teacher_ids)
    further = [ids for ids in row.teachers if ids != row.teacher_ids]
    return {
        "step": step,
        "problem": row.problem.id,
        "rollout": row.id,
        "student_prompt": row.problem.prompt,
        "teacher_prompt": prompt,
        "further_prompts": [tokenizer.decode(ids) for ids in further],
        "completion": row.text,
        "reward": row.reward,
        "tokens": token_texts(tokenizer, row.ids),
        "divergence": numbers(divergences[0]) if divergences else None,
        "advantage": None if row.advantage is None else numbers(row.advantage),
    }


def numbers(value):
    """Gives a number, or those of a tensor or list, as JSON holds them, to six decimal places."""
    values = torch.as_tensor(value)
    if not values.dim():
        return round(float(value), 6)
    return [round(number, 6) for number in values.flatten().tolist()]


def token_texts(tokenizer, ids) -> list[str]:
    """Decodes the tokens of a completion one by one, with the spaces that stand between them.

    Tokenizers put a space in front of a word only where another token stands before it. So each
    token is decoded behind the one before. A part of a character shows as U+FFFD.
    """
    alone = [tokenizer.decode([id]) for id in ids]
    texts = alone[:1]
    for pair, before, text in zip(pairwise(ids), alone, alone[1:], strict=False):
        both = tokenizer.decode(list(pair))
        is_behind = both.startswith(before) and both != before
        texts.append(both.removeprefix(before) if is_behind else text)
    return texts
