"""What a checkpoint reads and can do: its beliefs beside those of the exact reader, and the share
of tasks it gets right.
"""

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
    draw_secret,
    failed,
    first_wrong,
    items_json,
    prompt_ids,
    single_traps,
)
from nano.world import HIDDEN, KNOWN, OPERATIONS, SYLLABLES, attempt_text, problem_text, trap
from runtime.replies import parse

DIGITS = [3, 1, 7, 4]


@dataclass
class Question:
    """How likely does the model find each operation for the step that comes after `example.given`?

    warned: the operations that the block warns of, or [] where it does not. right: the operation
    that it tells, or "".
    """

    example: Example
    step: int
    exact: np.ndarray  # (8,)
    warned: list
    right: str = ""


class Draw:
    """One name of `length` syllables that the weights do not know, and a step of it to ask about.

    Each method shows one block and gives the Question: see BLOCKS.
    """

    def __init__(self, rng, length):
        self.rng, self.length = rng, length
        self.name = rng.sample(HIDDEN, length)
        self.secret = draw_secret(rng)
        self.truth = [self.secret[s] for s in self.name]
        self.step = rng.randrange(length)
        self.reader = Reader(self.name)
        self.whole = attempt_text(self.name, self.truth, DIGITS)
        self.warned = self.three_wrong()
        self.lessons = [f"{self.syllable}!{o}" for o in self.warned]
        if length > 1:
            others = [s for s in self.name if s != self.syllable]
            self.lessons += single_traps(rng, others, self.secret, rng.randint(0, 4))
        rng.shuffle(self.lessons)
        self.rules = [f"{s}={o}" for s, o in zip(self.name, self.truth, strict=True)]
        others = rng.sample([s for s in SYLLABLES if s not in self.name], 3)
        self.bank = rng.sample((self.name + others)[:3], 3)

    @property
    def syllable(self) -> str:
        return self.name[self.step]

    @property
    def right(self) -> str:
        return self.truth[self.step]

    def three_wrong(self) -> list[str]:
        return self.rng.sample([o for o in OPS if o != self.right], 3)

    def believe(self, *lines, wrong=0.0):
        for line in lines:
            self.reader.believe(line, wrong)

    def ask(self, warned=(), right="", prompt="", turns=(), given="", **context) -> Question:
        """Asks about the step after the right steps before it, with a context of memory.compose."""
        before = attempt_text(self.name[: self.step], self.truth[: self.step], DIGITS)
        given = f"{given} {before} {self.syllable}".strip()
        prompt = prompt or mem.compose(problem_text(self.name, DIGITS), **context)
        example = Example(prompt, "", self.reader, list(turns), given)
        exact = self.reader.next(self.truth[: self.step])
        return Question(example, self.step, exact, list(warned), right)

    def ask_with_lessons(self, lines, warned, **more) -> Question:
        self.believe(*lines)
        return self.ask(warned, lessons=[("trap", line) for line in lines], **more)

    def up_to(self, end) -> str:
        """The first steps of the right attempt."""
        return attempt_text(self.name[:end], self.truth[:end], DIGITS)

    def behaviors(self):
        lines = [f"{s}={self.secret[s]}" for s in self.bank]
        return lines, [(f"behavior_{s}", line) for s, line in zip(self.bank, lines, strict=True)]

    # -- blocks

    def none(self):
        return self.ask()

    def lessons_of_one_step(self):
        return self.ask_with_lessons(self.lessons, self.warned)

    def whole_lessons(self):
        """Three attempts that agree with what was named before, so that this step was wrong."""
        self.step = self.length - 1
        warned = self.three_wrong()
        lines = [trap(self.name, [*self.truth[:-1], o]) for o in warned]
        return self.ask_with_lessons(lines, warned)

    def any_whole_lessons(self):
        failures = failed(self.rng, self.name, self.secret, self.rng.randint(1, 10))
        return self.ask_with_lessons([trap(self.name, f) for f in failures], [])

    def strategies_and_whole_lessons(self):
        """All other steps are told, also those that come later."""
        before, after = self.truth[: self.step], self.truth[self.step + 1 :]
        lines = [trap(self.name, [*before, o, *after]) for o in self.warned]
        others = [rule for i, rule in enumerate(self.rules) if i != self.step]
        self.believe(*others, wrong=WRONG)
        strategies = [("rule", rule) for rule in others]
        return self.ask_with_lessons(lines, self.warned, strategies=strategies)

    def lessons_of_both_forms(self):
        failures = failed(self.rng, self.name, self.secret, 3)
        lines = [*self.lessons[:7], *(trap(self.name, f) for f in failures)]
        return self.ask_with_lessons(self.rng.sample(lines, len(lines)), self.warned)

    def feedback(self):
        claim = f"{self.syllable}!{self.warned[0]}"
        self.believe(claim)
        return self.ask(self.warned[:1], feedback=claim)

    def feedback_and_lessons(self):
        claim = f"{self.syllable}!{self.warned[0]}"
        lines = [line for line in self.lessons if line != claim or self.rng.random() < 0.5]
        self.believe(claim)
        return self.ask_with_lessons(lines, self.warned, feedback=claim)

    def strategy(self):
        self.believe(*self.rules, wrong=WRONG)
        return self.ask(right=self.right, strategies=[("rule", rule) for rule in self.rules])

    def behavior(self):
        lines, behaviors = self.behaviors()
        self.believe(*lines, wrong=WRONG)
        right = self.right if self.syllable in self.bank else ""
        return self.ask(right=right, behaviors=behaviors)

    def sibling(self):
        self.believe(self.whole)
        return self.ask(right=self.right, solution=self.whole)

    def example(self):
        """The same name on other digits."""
        solved = attempt_text(self.name, self.truth, DIGITS[::-1])
        self.believe(solved)
        return self.ask(
            right=self.right, examples=[(problem_text(self.name, DIGITS[::-1]), solved)]
        )

    def strategy_and_lessons(self):
        """The strategy is about this step, and right."""
        rule = f"{self.syllable}={self.right}"
        self.believe(rule, wrong=WRONG)
        strategies = [("rule", rule)]
        return self.ask_with_lessons(self.lessons, [], right=self.right, strategies=strategies)

    def wrong_strategy_and_lessons(self):
        """The lessons warn of the very operation that the strategy tells."""
        rule = f"{self.syllable}={self.warned[0]}"
        self.believe(rule, wrong=WRONG)
        return self.ask_with_lessons(self.lessons, self.warned, strategies=[("rule", rule)])

    def all_blocks(self):
        lines, behaviors = self.behaviors()
        self.believe(*self.rules, *lines, wrong=WRONG)
        self.believe(self.whole)
        return self.ask_with_lessons(
            self.lessons,
            [],
            right=self.right,
            strategies=[("rule", rule) for rule in self.rules],
            solution=self.whole,
            behaviors=behaviors,
            feedback=self.lessons[0],
        )

    def weights_and_lessons(self):
        """The weights know the step."""
        self.name[self.step] = self.rng.choice([s for s in KNOWN if s not in self.name])
        self.truth[self.step] = KNOWN[self.syllable]
        self.reader = Reader(self.name)
        lines = [f"{self.syllable}!{o}" for o in self.three_wrong()]
        lines += single_traps(self.rng, self.name, self.secret, 4)
        return self.ask_with_lessons(list(dict.fromkeys(lines)), [], right=self.right)

    def beginning(self):
        self.believe(self.up_to(self.step + 1))
        return self.ask(right=self.right, beginning=self.up_to(self.step + 1))

    def beginning_after_its_end(self):
        self.step = self.length - 1
        self.believe(self.up_to(self.step))
        return self.ask(beginning=self.up_to(self.step))

    def critique(self):
        self.believe(self.up_to(self.step + 1))
        return self.ask(right=self.right, critique=self.up_to(self.step + 1))

    def wrong_attempt(self):
        """An attempt whose first wrong step is the one asked about: operations, text."""
        rest = [self.rng.choice(OPS) for _ in self.name[self.step + 1 :]]
        attempt = [*self.truth[: self.step], self.warned[0], *rest]
        return attempt, attempt_text(self.name, attempt, DIGITS)

    def revision_of_a_wrong_attempt(self):
        attempt, text = self.wrong_attempt()
        self.believe(trap(self.name, attempt))
        excluded = self.warned[:1] if self.step == self.length - 1 else []
        return self.ask(excluded, given=f"{text} {mem.REVISE_WRONG}")

    def revision_of_a_right_attempt(self):
        self.believe(self.whole)
        return self.ask(right=self.right, given=f"{self.whole} {mem.REVISE_RIGHT}")

    def second_attempt(self):
        """What a second attempt knows, and its turns: the first wrong step was named."""
        attempt, text = self.wrong_attempt()
        self.believe(*self.rules[: self.step], f"{self.syllable}!{self.warned[0]}")
        turns = [("user", problem_text(self.name, DIGITS)), ("assistant", text)]
        return attempt, turns

    def second_attempt_warned(self):
        attempt, turns = self.second_attempt()
        prompt = f"{mem.AGAIN}\n{first_wrong(self.name, attempt, self.secret)}"
        return self.ask(self.warned[:1], turns=turns, prompt=prompt)

    def second_attempt_told(self):
        _, turns = self.second_attempt()
        rule = self.rules[self.step]
        self.believe(rule)
        return self.ask(right=self.right, turns=turns, prompt=f"{mem.AGAIN}\n{rule}")


ALL = (1, 2, 3)
# {block: (how it is shown, the lengths of names it is asked about)}
BLOCKS = {
    "none": (Draw.none, ALL),
    "strategy": (Draw.strategy, ALL),
    "behavior": (Draw.behavior, ALL),
    "sibling": (Draw.sibling, ALL),
    "example": (Draw.example, ALL),
    "lessons, one step each": (Draw.lessons_of_one_step, ALL),
    "lessons, whole": (Draw.whole_lessons, ALL),
    "lessons, whole, any": (Draw.any_whole_lessons, (2, 3)),
    "lessons of both forms": (Draw.lessons_of_both_forms, (2, 3)),
    "feedback": (Draw.feedback, ALL),
    "feedback + lessons": (Draw.feedback_and_lessons, ALL),
    "strategies + lessons, whole": (Draw.strategies_and_whole_lessons, (2, 3)),
    "strategy + lessons": (Draw.strategy_and_lessons, ALL),
    "wrong strategy + lessons": (Draw.wrong_strategy_and_lessons, ALL),
    "all blocks": (Draw.all_blocks, ALL),
    "weights + lessons": (Draw.weights_and_lessons, ALL),
    "beginning": (Draw.beginning, ALL),
    "beginning, after its end": (Draw.beginning_after_its_end, (2, 3)),
    "critique": (Draw.critique, ALL),
    "revision, wrong": (Draw.revision_of_a_wrong_attempt, ALL),
    "revision, right": (Draw.revision_of_a_right_attempt, ALL),
    "second attempt, warned": (Draw.second_attempt_warned, ALL),
    "second attempt, told": (Draw.second_attempt_told, ALL),
}
# a line for each length of name
APART = ("lessons, one step each", "lessons, whole", "lessons, whole, any")


def question(rng, block, length) -> Question:
    """Draws one question of a block about a name of `length` syllables."""
    shown, _ = BLOCKS[block]
    return shown(Draw(rng, length))


def beliefs(model, tokenizer, questions) -> np.ndarray:
    """(questions, 8): the model's probability of each operation at the step asked about, of all its
    vocabulary.
    """
    import torch

    ids, vocabulary = prompt_ids(tokenizer, [q.example for q in questions]), tokenizer.get_vocab()
    choices = [[vocabulary[f"{q.example.given.split()[-1]}={o}"] for o in OPS] for q in questions]
    found = np.zeros((len(questions), len(OPS)))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for part in (order[i : i + 64] for i in range(0, len(order), 64)):
        tokens = torch.full((len(part), max(len(ids[i]) for i in part)), tokenizer.pad_token_id)
        for row, i in enumerate(part):
            tokens[row, : len(ids[i])] = torch.tensor(ids[i])
        last = torch.tensor([len(ids[i]) - 1 for i in part])
        with torch.no_grad():
            hidden = model.model(input_ids=tokens).last_hidden_state[torch.arange(len(part)), last]
            probs = (
                model.lm_head(hidden)
                .softmax(-1)
                .gather(1, torch.tensor([choices[i] for i in part]))
            )
        found[part] = probs.double().numpy()
    return found


def reading(model, tokenizer, n=256, seed=10_000, blocks=tuple(BLOCKS)) -> dict:
    """{block: {"warned", "right", "other": (model, exact), "distance"}}: means over n questions.

    warned: the sum over the operations that the block warns of. right: the operation that the block
    tells. other: the sum over all the rest. distance: total variation between the model's
    distribution and the exact reader's.
    """
    lines = {}
    for block in blocks:
        _, lengths = BLOCKS[block]
        parts = {f"{block}, {k} syllable{'s' * (k > 1)}": (k,) for k in lengths}
        if block not in APART:
            parts = {block: lengths}
        for label, part in parts.items():
            rng = random.Random(f"{seed} {block}")
            lines[label] = [question(rng, block, part[i % len(part)]) for i in range(n)]
    everything = beliefs(model, tokenizer, [q for asked in lines.values() for q in asked])
    rows = np.split(everything, len(lines))
    return {label: compared(lines[label], row) for label, row in zip(lines, rows, strict=True)}


def compared(questions, model) -> dict:
    """A line of `reading`. model (n, 8): what the model believes."""
    exact = np.stack([q.exact for q in questions])
    roles = {
        "warned": np.array([[o in q.warned for o in OPS] for q in questions]),
        "right": np.array([[o == q.right for o in OPS] for q in questions]),
    }
    roles["other"] = ~(roles["warned"] | roles["right"])
    line = {}
    for role, mask in roles.items():
        asked = mask.any(1)
        if asked.any():
            sums = [(x * mask)[asked].sum(1).mean() for x in (model, exact)]
            line[role] = tuple(float(x) for x in sums)
    elsewhere = np.maximum(0, 1 - model.sum(1))
    line["distance"] = float((np.abs(model - exact).sum(1) + elsewhere).mean() / 2)
    return line


# --------------------------------------------------------------------------------------------------
# Whole replies
# --------------------------------------------------------------------------------------------------


def generate(model, tokenizer, examples, max_new_tokens=96):
    """Greedy replies, as texts."""
    import torch

    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": prompt_ids(tokenizer, examples)}, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def probe(model, tokenizer, n=256, seed=10_000):
    """What the checkpoint can do, as shares of n problems of unseen worlds (greedy replies).

    execution: the digits follow the operation it named. strategy, behavior, sibling, example:
    solves a problem whose operations only that block tells; an example is another problem of that
    name. reflect_win, reflect_loss: the insight of one attempt is exactly what it holds;
    reflect_feedback: the lesson of a failure is the step that its feedback names; contrastive: of
    one success and one failure. abstract: the behaviors of a cluster, exactly. critic: names the
    first wrong step. confidence: its stated probability is at most an eighth from the exact one.
    weights: solves what it holds in its weights; weights_beside_lessons: also with lessons of
    failed attempts in the prompt. entropy: nats over the operations of a syllable it was told
    nothing about (ln 8 = 2.08 is calibrated ignorance).
    """
    rng = random.Random(seed)
    draws = [draw(rng) for _ in range(n)]

    def share(prompts, wanted, equal=str.__eq__, max_new_tokens=96):
        examples = [p if isinstance(p, Example) else Example(p, "") for p in prompts]
        replies = generate(model, tokenizer, examples, max_new_tokens)
        return sum(equal(r, w) for r, w in zip(replies, wanted, strict=True)) / len(wanted)

    scores = uses(share, rng, draws) | reflections(share, rng, draws)
    examples = [abstraction(rng) for _ in range(n)]
    scores["abstract"] = share(examples, [e.reply for e in examples], same)
    examples = [critic(rng) for _ in range(n)]
    scores["critic"] = share(examples, [e.reply for e in examples])
    scores |= confidences(share, draws) | recall(share, rng)
    p = beliefs(model, tokenizer, untold(HIDDEN))
    scores["entropy"] = float(-(p * np.log(p)).sum(1).mean())
    return scores


def untold(syllables) -> list[Question]:
    """Asks about syllables of which nothing is told."""
    questions = []
    for s in syllables:
        reader = Reader([s])
        given = f"{attempt_text([], [], DIGITS)} {s}"
        example = Example(problem_text([s], DIGITS), "", reader, [], given)
        questions.append(Question(example, 0, reader.next([]), []))
    return questions


def uses(share, rng, draws) -> dict:
    """Solves problems, with nothing or one block of a teacher's prompt."""
    problems, truths, rules, solved, banks = [], [], [], [], []
    for name, secret, digits in draws:
        operations = [secret[s] for s in name]
        problems.append(problem_text(name, digits))
        truths.append(attempt_text(name, operations, digits))
        rules.append([("rule", f"{s}={secret[s]}") for s in name])
        other = digits[::-1]
        solved.append([(problem_text(name, other), attempt_text(name, operations, other))])
        bank = (name + rng.sample([s for s in SYLLABLES if s not in name], 3))[:3]
        banks.append([(f"behavior_{s}", f"{s}={secret[s]}") for s in rng.sample(bank, 3)])
    named = [(name, digits) for name, _, digits in draws]
    scores = {"execution": share(problems, named, executes, 32)}
    blocks = {
        "strategy": ("strategies", rules),
        "behavior": ("behaviors", banks),
        "sibling": ("solution", truths),
        "example": ("examples", solved),
    }
    for kind, (block, contents) in blocks.items():
        pairs = zip(problems, contents, strict=True)
        prompts = [mem.compose(problem, **{block: content}) for problem, content in pairs]
        scores[kind] = share(prompts, truths, max_new_tokens=32)
    return scores


def reflections(share, rng, draws) -> dict:
    """Writes the insight of given attempts."""
    failures = [failed(rng, name, secret)[0] for name, secret, _ in draws]
    prompts = {"reflect_win": [], "reflect_loss": [], "reflect_feedback": [], "contrastive": []}
    wanted = {kind: [] for kind in prompts}
    for (name, secret, digits), failure in zip(draws, failures, strict=True):
        problem = problem_text(name, digits)
        win = attempt_text(name, [secret[s] for s in name], digits)
        loss = attempt_text(name, failure, digits)
        strategies = [f"{s}={secret[s]}" for s in name]
        whole, step = trap(name, failure), first_wrong(name, failure, secret)
        for kind, wins, losses, insight in (
            ("reflect_win", [win], [], items_json(strategies, [])),
            ("reflect_loss", [], [(loss, "")], items_json([], [whole])),
            ("reflect_feedback", [], [(loss, step)], items_json([], [step])),
            ("contrastive", [win], [(loss, "")], items_json(strategies, [whole])),
        ):
            prompt = mem.reflection_prompt(mem.NANO, problem, wins, losses, len(wins), 8)
            prompts[kind].append(prompt)
            wanted[kind].append(insight)
    return {kind: share(prompts[kind], wanted[kind], same) for kind in prompts}


def confidences(share, draws) -> dict:
    """States its chance, told none to all of a problem's operations."""
    prompts, readers = [], []
    for i, (name, secret, digits) in enumerate(draws):
        rules = [("rule", f"{s}={secret[s]}") for s in name][: i % 4]
        question = f"{problem_text(name, digits)}\n{mem.ASK_CONFIDENCE}"
        prompts.append(mem.compose(question, strategies=rules))
        readers.append(told_first(name, rules))
    return {"confidence": share(prompts, readers, states_its_chance, 32)}


def recall(share, rng) -> dict:
    """Solves what only its weights hold, alone and beside lessons."""
    names = [[s, t] for s in KNOWN for t in KNOWN if s != t]
    truths = [attempt_text(name, [KNOWN[s] for s in name], DIGITS) for name in names]
    scores = {}
    for kind, count in (("weights", 0), ("weights_beside_lessons", 6)):
        prompts = []
        for name in names:
            failures = failed(rng, name, KNOWN, count)[:count]
            lessons = [("trap", trap(name, failure)) for failure in failures]
            prompts.append(mem.compose(problem_text(name, DIGITS), lessons=lessons))
        scores[kind] = share(prompts, truths, max_new_tokens=32)
    return scores


def executes(reply, problem) -> bool:
    """Whether a reply names an operation for each syllable of (name, digits) and its digits follow
    from them.
    """
    name, digits = problem
    operations = [w.split("=")[1] for w in reply.split() if "=" in w]
    return (
        len(operations) == len(name)
        and all(o in OPERATIONS for o in operations)
        and reply == attempt_text(name, operations, digits)
    )


def same(reply, wanted) -> bool:
    """Whether memory's parser finds the same items in both."""
    fields = {
        "strategies": ("title", "content"),
        "lessons": ("title", "content"),
        "behaviors": ("name", "instruction"),
        "actions": ("action", "name", "instruction"),
    }
    found, wanted = parse(reply), json.loads(wanted)
    return (
        found is not None
        and found.keys() == wanted.keys()
        and all(
            mem.parse_items(found, k, *pair) == mem.parse_items(wanted, k, *pair)
            for k in wanted
            for pair in zip(fields[k], fields[k][1:], strict=False)
        )
    )


def told_first(name, rules):
    reader = Reader(name)
    for _, line in rules:
        reader.believe(line, WRONG)
    return reader


def states_its_chance(reply, reader) -> bool:
    operations = [w.split("=")[1] for w in reply.split() if "=" in w]
    level = reply.split()[-1] if reply else ""
    if (
        level not in LEVELS
        or len(operations) != len(reader.name)
        or not set(operations) <= set(OPS)
    ):
        return False
    return abs(float(level) - reader.probability(operations)) <= 0.125


def table(model, tokenizer, n=256) -> str:
    """Both tables as text."""
    lines = [
        (
            f"{'probability of operations':36s} {'warned of':>14s} {'told':>14s}"
            f" {'all others':>14s}   distance"
        ),
        f"{'':36s} " + " ".join([f"{'model exact':>14s}"] * 3),
    ]
    for block, row in reading(model, tokenizer, n).items():
        cells = [
            f"{row[k][0]:8.3f} {row[k][1]:5.3f}" if k in row else " " * 14
            for k in ("warned", "right", "other")
        ]
        lines.append(f"{block:36s} {' '.join(cells)} {row['distance']:10.3f}")
    lines.append("")
    return "\n".join(lines + [f"{k:22s} {v:.3f}" for k, v in probe(model, tokenizer, n).items()])
