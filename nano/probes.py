"""What a checkpoint reads and can do: its beliefs beside those of the exact reader, and the share of tasks it gets right."""

import json
import random
from dataclasses import dataclass

import numpy as np

import memory as mem
from nano.examples import (
    LEVELS,
    OPS,
    WRONG,
    Example,
    Reader,
    abstraction,
    critic,
    draw,
    failed,
    first_wrong,
    items_json,
    single_traps,
)
from nano.world import HIDDEN, KNOWN, OPERATIONS, SYLLABLES, attempt_text, problem_text, trap
from runtime.replies import parse

DIGITS = [3, 1, 7, 4]


@dataclass
class Question:
    """How likely does the model find each operation for the step that comes after `example.given`?

    warned: the operations that the block warns of, or [] where it does not. right: the operation that it tells, or "".
    """

    example: Example
    step: int
    exact: np.ndarray  # (8,)
    warned: list
    right: str = ""


def ask(name, truth, step, reader, warned=(), right="", prompt="", turns=(), given="", **context):
    """A Question about `step` of a name, after the right steps before it, with a context of memory.compose."""
    before = attempt_text(name[:step], truth[:step], DIGITS)
    given = f"{given} {before} {name[step]}".strip()
    example = Example(prompt or mem.compose(problem_text(name, DIGITS), **context), "", reader, list(turns), given)
    return Question(example, step, reader.next(truth[:step]), list(warned), right)


def warned_about(rng, name, step, truth, n=3):
    return rng.sample([o for o in OPS if o != truth[step]], n)


def question(rng, block, length):
    """One question of a block (see BLOCKS) about a name of `length` syllables, none of them known to the weights."""
    name = rng.sample(HIDDEN, length)
    secret = {s: rng.choice(OPS) for s in HIDDEN} | KNOWN
    truth, step, reader = [secret[s] for s in name], rng.randrange(length), Reader(name)
    syllable, right, whole = name[step], truth[step], attempt_text(name, truth, DIGITS)
    warned = warned_about(rng, name, step, truth)
    lessons = [f"{syllable}!{o}" for o in warned]
    lessons += single_traps(rng, [s for s in name if s != syllable], secret, rng.randint(0, 4)) if length > 1 else []
    rng.shuffle(lessons)
    rules = [f"{s}={o}" for s, o in zip(name, truth, strict=True)]
    bank = rng.sample((name + rng.sample([s for s in SYLLABLES if s not in name], 3))[:3], 3)

    def believing(*lines, wrong=0.0):
        for line in lines:
            reader.believe(line, wrong)
        return reader

    def showing_lessons(lines, about, **more):
        return ask(name, truth, step, believing(*lines), about, lessons=[("trap", line) for line in lines], **more)

    if block == "none":
        return ask(name, truth, step, reader)
    if block == "lessons, one step each":
        return showing_lessons(lessons, warned)
    if block == "lessons, whole":  # three attempts that agree with what was named before, so that this step was wrong
        step = length - 1
        warned = warned_about(rng, name, step, truth)
        return showing_lessons([trap(name, [*truth[:-1], o]) for o in warned], warned)
    if block == "lessons, whole, any":
        lines = [trap(name, f) for f in failed(rng, name, secret, rng.randint(1, 10))]
        return showing_lessons(lines, [])
    if block == "strategies + lessons, whole":  # all other steps are told, also those that come later
        lines = [trap(name, [*truth[:step], o, *truth[step + 1:]]) for o in warned]
        others = [r for i, r in enumerate(rules) if i != step]
        believing(*others, wrong=WRONG)
        return showing_lessons(lines, warned, strategies=[("rule", r) for r in others])
    if block == "lessons of both forms":
        lines = [*lessons[:7], *(trap(name, f) for f in failed(rng, name, secret, 3))]
        return showing_lessons(rng.sample(lines, len(lines)), warned)
    if block == "feedback":
        return ask(name, truth, step, believing(f"{syllable}!{warned[0]}"), warned[:1], feedback=f"{syllable}!{warned[0]}")
    if block == "feedback + lessons":
        said = f"{syllable}!{warned[0]}"
        rest = [line for line in lessons if line != said or rng.random() < 0.5]
        believing(said)
        return showing_lessons(rest, warned, feedback=said)
    if block == "strategy":
        return ask(name, truth, step, believing(*rules, wrong=WRONG), right=right, strategies=[("rule", r) for r in rules])
    if block == "behavior":
        lines = [f"{s}={secret[s]}" for s in bank]
        return ask(name, truth, step, believing(*lines, wrong=WRONG), right=right if syllable in bank else "",
                   behaviors=[(f"behavior_{s}", line) for s, line in zip(bank, lines, strict=True)])
    if block == "sibling":
        return ask(name, truth, step, believing(whole), right=right, solution=whole)
    if block == "example":
        shown = attempt_text(name, truth, DIGITS[::-1])
        return ask(name, truth, step, believing(shown), right=right,
                   examples=[(problem_text(name, DIGITS[::-1]), shown)])
    if block == "strategy + lessons":  # the strategy is about this step, and right
        believing(f"{syllable}={right}", wrong=WRONG)
        return showing_lessons(lessons, [], right=right, strategies=[("rule", f"{syllable}={right}")])
    if block == "wrong strategy + lessons":  # that warn of the very operation it tells
        believing(f"{syllable}={warned[0]}", wrong=WRONG)
        return showing_lessons(lessons, warned, strategies=[("rule", f"{syllable}={warned[0]}")])
    if block == "all blocks":
        lines = [f"{s}={secret[s]}" for s in bank]
        believing(*rules, *lines, wrong=WRONG)
        believing(whole)
        return showing_lessons(lessons, [], right=right, strategies=[("rule", r) for r in rules], solution=whole,
                               behaviors=[(f"behavior_{s}", line) for s, line in zip(bank, lines, strict=True)],
                               feedback=lessons[0])
    if block == "weights + lessons":
        name[step] = rng.choice([s for s in KNOWN if s not in name])
        truth[step] = KNOWN[name[step]]
        reader = Reader(name)
        warned = warned_about(rng, name, step, truth)
        lines = [f"{name[step]}!{o}" for o in warned] + single_traps(rng, name, secret, 4)
        return showing_lessons(list(dict.fromkeys(lines)), [], right=truth[step])
    if block == "beginning":
        return ask(name, truth, step, believing(attempt_text(name[:step + 1], truth[:step + 1], DIGITS)), right=right,
                   beginning=attempt_text(name[:step + 1], truth[:step + 1], DIGITS))
    if block == "beginning, after its end":
        step = length - 1
        shown = attempt_text(name[:step], truth[:step], DIGITS)
        return ask(name, truth, step, believing(shown), beginning=shown)
    if block == "critique":
        shown = attempt_text(name[:step + 1], truth[:step + 1], DIGITS)
        return ask(name, truth, step, believing(shown), right=right, critique=shown)
    if block in ("revision, wrong", "second attempt, warned", "second attempt, told"):
        attempt = [*truth[:step], warned[0], *(rng.choice(OPS) for _ in name[step + 1:])]
        text = attempt_text(name, attempt, DIGITS)
        if block == "revision, wrong":
            excluded = warned[:1] if step == length - 1 else []
            return ask(name, truth, step, believing(trap(name, attempt)), excluded, given=f"{text} {mem.REVISE_WRONG}")
        believing(*(f"{s}={o}" for s, o in zip(name[:step], truth[:step], strict=True)), f"{syllable}!{warned[0]}")
        turns = [("user", problem_text(name, DIGITS)), ("assistant", text)]
        if block == "second attempt, warned":
            return ask(name, truth, step, reader, warned[:1], turns=turns,
                       prompt=f"{mem.AGAIN}\n{first_wrong(name, attempt, secret)}")
        return ask(name, truth, step, believing(rules[step]), right=right, turns=turns, prompt=f"{mem.AGAIN}\n{rules[step]}")
    if block == "revision, right":
        return ask(name, truth, step, believing(whole), right=right, given=f"{whole} {mem.REVISE_RIGHT}")
    raise ValueError(f"there is no block {block!r}")


# Each with the lengths of names it is asked about.
BLOCKS = {
    "none": (1, 2, 3), "strategy": (1, 2, 3), "behavior": (1, 2, 3), "sibling": (1, 2, 3), "example": (1, 2, 3),
    "lessons, one step each": (1, 2, 3), "lessons, whole": (1, 2, 3), "lessons, whole, any": (2, 3),
    "lessons of both forms": (2, 3), "feedback": (1, 2, 3), "feedback + lessons": (1, 2, 3),
    "strategies + lessons, whole": (2, 3), "strategy + lessons": (1, 2, 3), "wrong strategy + lessons": (1, 2, 3),
    "all blocks": (1, 2, 3), "weights + lessons": (1, 2, 3), "beginning": (1, 2, 3), "beginning, after its end": (2, 3),
    "critique": (1, 2, 3), "revision, wrong": (1, 2, 3), "revision, right": (1, 2, 3), "second attempt, warned": (1, 2, 3),
    "second attempt, told": (1, 2, 3)}
APART = ("lessons, one step each", "lessons, whole", "lessons, whole, any")  # a line for each length of name


def beliefs(model, tokenizer, questions) -> np.ndarray:
    """(questions, 8): the model's probability of each operation at the step asked about, of all its vocabulary."""
    import torch

    from nano.make import prompt_ids

    ids, vocabulary = prompt_ids(tokenizer, [q.example for q in questions]), tokenizer.get_vocab()
    choices = [[vocabulary[f"{q.example.given.split()[-1]}={o}"] for o in OPS] for q in questions]
    found = np.zeros((len(questions), len(OPS)))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for part in (order[i: i + 64] for i in range(0, len(order), 64)):
        tokens = torch.full((len(part), max(len(ids[i]) for i in part)), tokenizer.pad_token_id)
        for row, i in enumerate(part):
            tokens[row, : len(ids[i])] = torch.tensor(ids[i])
        last = torch.tensor([len(ids[i]) - 1 for i in part])
        with torch.no_grad():
            hidden = model.model(input_ids=tokens).last_hidden_state[torch.arange(len(part)), last]
            probs = model.lm_head(hidden).softmax(-1).gather(1, torch.tensor([choices[i] for i in part]))
        found[part] = probs.double().numpy()
    return found


def reading(model, tokenizer, n=256, seed=10_000, blocks=BLOCKS) -> dict:
    """{block: {"warned", "right", "other": (model, exact), "distance"}}: means over n questions of each.

    warned: the sum over the operations that the block warns of. right: the operation that the block tells. other: the sum
    over all the rest. distance: total variation between the model's distribution and the exact reader's.
    """
    lines = {}
    for block, lengths in blocks.items():
        for part in [(k,) for k in lengths] if block in APART else [lengths]:
            rng = random.Random(f"{seed} {block}")
            asked = [question(rng, block, part[i % len(part)]) for i in range(n)]
            lines[f"{block}, {part[0]} syllable{'s' * (part[0] > 1)}" if block in APART else block] = asked
    everything = beliefs(model, tokenizer, [q for asked in lines.values() for q in asked])
    found, start = {}, 0
    for label, asked in lines.items():
        got, exact = everything[start: start + n], np.stack([q.exact for q in asked])
        start += n
        roles = {"warned": np.array([[o in q.warned for o in OPS] for q in asked]),
                 "right": np.array([[o == q.right for o in OPS] for q in asked])}
        roles["other"] = ~(roles["warned"] | roles["right"])
        found[label] = {role: tuple(float((x * mask)[mask.any(1)].sum(1).mean()) for x in (got, exact))
                        for role, mask in roles.items() if mask.any()}
        found[label]["distance"] = float((np.abs(got - exact).sum(1) + np.maximum(0, 1 - got.sum(1))).mean() / 2)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Whole replies
# ---------------------------------------------------------------------------------------------------------------------

def generate(model, tokenizer, examples, max_new_tokens=96):
    """Greedy replies, as texts."""
    import torch

    from nano.make import prompt_ids

    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": prompt_ids(tokenizer, examples)}, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False,
                             max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)


def probe(model, tokenizer, n=256, seed=10_000):
    """What the checkpoint can do, as shares of n problems of unseen worlds (greedy replies).

    execution: the digits follow the operation it named. strategy, behavior, sibling, example: solves a problem whose
    operations only that block tells; an example is another problem of that name. reflect_win, reflect_loss: the insight of
    one attempt is exactly what it holds; reflect_feedback: the lesson of a failure is the step that its feedback names;
    contrastive: of one success and one failure. abstract: the behaviors of a cluster, exactly. critic: names the first
    wrong step. confidence: its stated probability is at most an eighth from the exact one. weights: solves what it holds
    in its weights; weights_beside_lessons: also with lessons of failed attempts in the prompt. entropy: nats over the
    operations of a syllable it was told nothing about (ln 8 = 2.08 is calibrated ignorance).
    """
    rng, scores = random.Random(seed), {}
    draws = [draw(rng) for _ in range(n)]
    truths = [attempt_text(name, [secret[s] for s in name], digits) for name, secret, digits in draws]
    problems = [problem_text(name, digits) for name, _, digits in draws]

    def replies(prompts, max_new_tokens=96):
        examples = [p if isinstance(p, Example) else Example(p, "") for p in prompts]
        return generate(model, tokenizer, examples, max_new_tokens)

    def share(prompts, wanted, equal=str.__eq__, max_new_tokens=96):
        return sum(equal(r, w) for r, w in zip(replies(prompts, max_new_tokens), wanted, strict=True)) / len(wanted)

    scores["execution"] = share(problems, [(name, digits) for name, _, digits in draws], executes, 32)
    rules = [[("rule", f"{s}={secret[s]}") for s in name] for name, secret, _ in draws]
    banks = []
    for name, secret, _ in draws:
        bank = (name + rng.sample([s for s in SYLLABLES if s not in name], 3))[:3]
        banks.append([(f"behavior_{s}", f"{s}={secret[s]}") for s in rng.sample(bank, 3)])
    solved = [[(problem_text(name, d[::-1]), attempt_text(name, [secret[s] for s in name], d[::-1]))]
              for name, secret, d in draws]
    for kind, block, contents in (("strategy", "strategies", rules), ("behavior", "behaviors", banks),
                                  ("sibling", "solution", truths), ("example", "examples", solved)):
        prompts = [mem.compose(p, **{block: content}) for p, content in zip(problems, contents, strict=True)]
        scores[kind] = share(prompts, truths, max_new_tokens=32)

    failures = [failed(rng, name, secret)[0] for name, secret, _ in draws]
    lost = [attempt_text(name, f, d) for (name, _, d), f in zip(draws, failures, strict=True)]
    whole = [trap(name, f) for (name, _, _), f in zip(draws, failures, strict=True)]
    said = [first_wrong(name, f, secret) for (name, secret, _), f in zip(draws, failures, strict=True)]
    contents = [[c for _, c in r] for r in rules]

    def reflect(wins, losses):
        return [mem.reflection_prompt(mem.NANO, p, w, x, len(w), 8) for p, w, x in zip(problems, wins, losses, strict=True)]

    won, nothing = [[t] for t in truths], [[]] * n
    silent, spoken = [[(x, "")] for x in lost], [[(x, f)] for x, f in zip(lost, said, strict=True)]
    scores["reflect_win"] = share(reflect(won, nothing), [items_json(c, []) for c in contents], same)
    scores["reflect_loss"] = share(reflect(nothing, silent), [items_json([], [t]) for t in whole], same)
    scores["reflect_feedback"] = share(reflect(nothing, spoken), [items_json([], [t]) for t in said], same)
    scores["contrastive"] = share(reflect(won, silent), [items_json(c, [t]) for c, t in zip(contents, whole, strict=True)],
                                  same)
    for kind, examples in (("abstract", [abstraction(rng) for _ in range(n)]), ("critic", [critic(rng) for _ in range(n)])):
        scores[kind] = share(examples, [e.reply for e in examples], same if kind == "abstract" else str.__eq__)
    asked = [mem.compose(f"{p}\n{mem.ASK_CONFIDENCE}", strategies=r[: i % 4])
             for i, (p, r) in enumerate(zip(problems, rules, strict=True))]
    readers = [told_first(name, r[: i % 4]) for i, ((name, _, _), r) in enumerate(zip(draws, rules, strict=True))]
    scores["confidence"] = share(asked, readers, states_its_chance, 32)

    known = [([s, t], DIGITS) for s in KNOWN for t in KNOWN if s != t]
    truths = [attempt_text(name, [KNOWN[s] for s in name], digits) for name, digits in known]
    for kind, lessons in (("weights", 0), ("weights_beside_lessons", 6)):
        prompts = [mem.compose(problem_text(name, digits), lessons=[
            ("trap", trap(name, f)) for f in failed(rng, name, KNOWN, lessons)[:lessons]]) for name, digits in known]
        scores[kind] = share(prompts, truths, max_new_tokens=32)
    questions = [ask([s], ["rev"], 0, Reader([s])) for s in HIDDEN]
    p = beliefs(model, tokenizer, questions)
    scores["entropy"] = float(-(p * np.log(p)).sum(1).mean())
    return scores


def executes(reply, problem) -> bool:
    """Whether a reply names an operation for each syllable of (name, digits) and its digits follow from them."""
    name, digits = problem
    operations = [w.split("=")[1] for w in reply.split() if "=" in w]
    return (len(operations) == len(name) and all(o in OPERATIONS for o in operations)
            and reply == attempt_text(name, operations, digits))


def same(reply, wanted) -> bool:
    """Whether memory's parser finds the same items in both."""
    fields = {"strategies": ("title", "content"), "lessons": ("title", "content"),
              "behaviors": ("name", "instruction"), "actions": ("action", "name", "instruction")}
    found, wanted = parse(reply), json.loads(wanted)
    return found is not None and found.keys() == wanted.keys() and all(
        mem.parse_items(found, k, *pair) == mem.parse_items(wanted, k, *pair)
        for k in wanted for pair in zip(fields[k], fields[k][1:], strict=False))


def told_first(name, rules):
    reader = Reader(name)
    for _, line in rules:
        reader.believe(line, WRONG)
    return reader


def states_its_chance(reply, reader) -> bool:
    operations = [w.split("=")[1] for w in reply.split() if "=" in w]
    level = reply.split()[-1] if reply else ""
    if level not in LEVELS or len(operations) != len(reader.name) or not set(operations) <= set(OPS):
        return False
    return abs(float(level) - reader.probability(operations)) <= 0.125


def table(model, tokenizer, n=256) -> str:
    """Both tables as text."""
    lines = [f"{'probability of operations':36s} {'warned of':>14s} {'told':>14s} {'all others':>14s}   distance",
             f"{'':36s} " + " ".join([f"{'model exact':>14s}"] * 3)]
    for block, row in reading(model, tokenizer, n).items():
        cells = [f"{row[k][0]:8.3f} {row[k][1]:5.3f}" if k in row else " " * 14 for k in ("warned", "right", "other")]
        lines.append(f"{block:36s} {' '.join(cells)} {row['distance']:10.3f}")
    lines.append("")
    return "\n".join(lines + [f"{k:22s} {v:.3f}" for k, v in probe(model, tokenizer, n).items()])
