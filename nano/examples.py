"""What the embedded model is trained on: endless examples, each from a world of its own, and the
exact reader of each.

Where a completion names an operation, the target is not the one operation that this example's world
hides, but the distribution of `Reader`: the exact posterior over the eight, given all that the
prompt says and what the completion has named so far. The model so learns to believe a block as far
as it should be believed, without the noise of single draws.
"""

import itertools
import json
import re
from dataclasses import dataclass, field

import numpy as np

import memory as mem  # the prompts' words come from the very code that will use them
from nano.world import HIDDEN, KNOWN, OPERATIONS, SYLLABLES, attempt_text, problem_text, trap

OPS = list(OPERATIONS)
# share of the strategies and behaviors in a prompt whose operation is drawn anew: a model miscopies
# some
WRONG = 0.04
LEVELS = [f"{k / 8:.2f}" for k in range(9)]  # confidence: the share of a group of eight


class Reader:
    """The posterior over the operations of a name, for a reader who starts from a uniform one.

    weights: (syllables, 8), what is known of each step alone; KNOWN syllables start with their
    operation. combinations: whole ones that are wrong somewhere, as {step: operation}. All
    probabilities come by enumeration of the 8^n maps.
    """

    def __init__(self, name):
        self.name, self.combinations = list(name), []
        self.weights = np.ones((len(self.name), len(OPS)))
        for i, syllable in enumerate(self.name):
            if syllable in KNOWN:
                self.weights[i] = np.eye(len(OPS))[OPS.index(KNOWN[syllable])]

    def believe(self, text, wrong=0.0):
        """Takes in a line of the prompt: pairs such as vo=rev say what is right, `wrong` being the
        share of such lines whose operation was drawn anew; all vo!rev of a line together say that
        at least one of them is wrong.
        """
        pairs = re.findall(r"([a-z]+)([=!])([a-z]+)", text)
        told = [(s, OPS.index(o)) for s, sign, o in pairs if sign == "=" and s in self.name]
        for syllable, op in told:
            self.weights[self.name.index(syllable)] *= (
                wrong / len(OPS) + (1 - wrong) * np.eye(len(OPS))[op]
            )
        warned = [(s, OPS.index(o)) for s, sign, o in pairs if sign == "!"]
        # else a step that this name has not may be the wrong one
        if warned and all(s in self.name for s, _ in warned):
            self.combinations.append({self.name.index(s): op for s, op in warned})
        return self

    def joint(self) -> np.ndarray:
        """(8,) * syllables: the probability of each map of the name."""
        table = np.ones(())
        for row in self.weights:
            table = table[..., None] * row
        for combination in self.combinations:
            table[tuple(combination.get(i, slice(None)) for i in range(len(self.name)))] = 0.0
        return table / table.sum()

    def next(self, operations) -> np.ndarray:
        """(8,): the distribution of the step after `operations`, which the completion has named and
        the reader believes.
        """
        table = self.joint()[tuple(OPS.index(o) for o in operations)]
        table = table.reshape(len(OPS), -1).sum(1)
        return table / table.sum()

    def probability(self, operations) -> float:
        return float(self.joint()[tuple(OPS.index(o) for o in operations)])

    def draw(self, rng) -> list[str]:
        table = self.joint()
        found = np.unravel_index(rng.choices(range(table.size), table.ravel())[0], table.shape)
        return [OPS[i] for i in found]


@dataclass
class Example:
    """prompt: the user's message. turns: (role, text) of the messages before it. given: how the
    assistant's turn begins. reply: what is learned. reader: the exact reader of all before the
    reply, where the reply is an attempt.
    """

    prompt: str
    reply: str
    reader: Reader | None = None
    turns: list = field(default_factory=list)
    given: str = ""

    def targets(self) -> list[tuple[int, str, np.ndarray]]:
        """(word of the reply, syllable, distribution over the operations) wherever the reply names
        one.
        """
        found, named = [], []
        for i, word in enumerate(self.reply.split() if self.reader else []):
            if "=" in word:
                syllable, op = word.split("=")
                found.append((i, syllable, self.reader.next(named)))
                named.append(op)
        return found


# --------------------------------------------------------------------------------------------------
# Draws
# --------------------------------------------------------------------------------------------------


def draw(rng, lengths=(1, 2, 2, 3, 3)):
    """(name, secret map, digits)"""
    return rng.sample(SYLLABLES, rng.choice(lengths)), draw_secret(rng), rng.sample(range(10), 4)


def draw_secret(rng):
    return {s: rng.choice(OPS) for s in HIDDEN} | KNOWN


def told(rng, syllable, secret, wrong=WRONG):
    """A memory's word on a syllable: true but for a share `wrong` of the time."""
    return f"{syllable}={rng.choice(OPS) if rng.random() < wrong else secret[syllable]}"


def failed(rng, name, secret, n=1):
    """Up to n different attempts (operations) with at least one wrong, of a policy that knows some
    syllables better.
    """
    skill, found = {s: rng.choice((0.0, 0.0, 0.5, 0.95)) for s in name}, []
    for _ in range(8 * n):
        operations = [secret[s] if rng.random() < skill[s] else rng.choice(OPS) for s in name]
        if operations != [secret[s] for s in name] and operations not in found:
            found.append(operations)
    return found[:n] if found or not n else failed(rng, name, secret, n)


def first_wrong(name, operations, secret) -> str:
    """What a verifier that speaks says of a failed attempt: `mi!inc`."""
    return next(f"{s}!{o}" for s, o in zip(name, operations, strict=True) if o != secret[s])


def single_traps(rng, name, secret, n):
    """Up to n different lessons about one step each, half of the time most of them about the same
    step.
    """
    focus = rng.choice(name) if rng.random() < 0.5 else None
    pairs = [(s, o) for s in name for o in OPS if o != secret[s]]
    pairs.sort(key=lambda pair: rng.random() * (0.3 if pair[0] == focus else 1.0))
    chosen = [f"{s}!{o}" for s, o in pairs[:n]]
    rng.shuffle(chosen)
    return chosen


def near_misses(rng, name, secret, n):
    """Up to n different attempts of a policy that knows all steps but one, mostly the last: what
    whole combinations exclude can be read off them once the other steps are known.
    """
    unknown, found = rng.choice((len(name) - 1, rng.randrange(len(name)))), []
    for _ in range(2 * n):
        operations = [secret[s] if rng.random() < 0.93 else rng.choice(OPS) for s in name]
        operations[unknown] = rng.choice([o for o in OPS if o != secret[name[unknown]]])
        if operations not in found:
            found.append(operations)
    return found[:n]


def crossed(rng, name, secret, n):
    """Up to n different failed attempts (operations) that differ in one step, mostly the last,
    while each of the others is one of two operations: some of them agree with the steps before, and
    most do not.
    """
    varied, found = rng.choice((len(name) - 1, len(name) - 1, rng.randrange(len(name)))), []
    pairs = [[secret[s], secret[s] if s in KNOWN else rng.choice(OPS)] for s in name]
    for _ in range(2 * n):
        operations = [rng.choice(pair) for pair in pairs]
        operations[varied] = rng.choice(OPS)
        if operations != [secret[s] for s in name] and operations not in found:
            found.append(operations)
    return found[:n] if found or not n else crossed(rng, name, secret, n)


def traps(rng, name, secret):
    """Lessons of one problem, up to ten: about one step each, about whole combinations, or both."""
    n = rng.choice((1, 2, 3, 4, 5, 6, 8, 10))
    form = rng.choice(("one", "one", "whole", "whole", "whole", "both"))
    lines = single_traps(rng, name, secret, n) if form != "whole" else []
    if form == "both":
        lines = lines[: n // 2]
    if form != "one":
        draws = (
            rng.choice((near_misses, crossed, crossed, failed, failed)) if len(name) > 1 else failed
        )
        attempts = draws(rng, name, secret, n - len(lines))
        lines += [trap(name, f) for f in attempts]
    if rng.random() < 0.1:  # a neighbour's
        other = rng.choice([s for s in HIDDEN if s not in name])
        lines.append(f"{other}!{rng.choice([o for o in OPS if o != secret[other]])}")
    rng.shuffle(lines)
    return lines[:10]


# --------------------------------------------------------------------------------------------------
# Attempts, with a memory in the prompt
# --------------------------------------------------------------------------------------------------

# s strategies, b behaviors, e a sibling's solution, x an example, l lessons, f feedback, c
# critique, p part of a solution
MIXES = (
    "s b e x s b e x f f c p sb se be sx sbe sbx sl bl el xl sbl sbel sblx lf lf lf slf blf elf"
    " sblf sbelf cl pl cf pf clf"
).split()
# share of the examples with a memory that show lessons and nothing else: exclusion is slow to learn
ALONE = 0.45


def context(rng, name, secret, digits, shown):
    """(arguments of memory.compose, the reader who has read them) with the blocks `shown`, letters
    as in MIXES.
    """
    reader, found, truth = Reader(name), {}, [secret[s] for s in name]
    # more often where a lesson may contradict it; the reader counts on WRONG
    wrong = 0.25 if "l" in shown else WRONG
    others = rng.sample([s for s in SYLLABLES if s not in name], 3)
    if "s" in shown:
        some = name if rng.random() < 0.7 else rng.sample(name, rng.randint(1, len(name)))
        found["strategies"] = [("rule", told(rng, s, secret, wrong)) for s in some]
    if "b" in shown:
        bank = ([s for s in name if rng.random() < 0.85] + others)[:3]
        found["behaviors"] = [
            (f"behavior_{s}", told(rng, s, secret, wrong)) for s in rng.sample(bank, 3)
        ]
    lines = traps(rng, name, secret) if "l" in shown else []
    for _, line in found.get("strategies", []) + found.get("behaviors", []):
        reader.believe(line, WRONG)
        syllable, op = line.split("=")
        if lines and syllable in name and op != secret[syllable] and rng.random() < 0.5:
            lines[rng.randrange(len(lines))] = f"{syllable}!{op}"
    if lines:
        found["lessons"] = [("trap", line) for line in lines]
    if "x" in shown:  # another problem of the same name, or one that shares a syllable
        other = name if rng.random() < 0.8 else [rng.choice(name), *others[:1]]
        other_digits = rng.sample(range(10), 4)
        solved = attempt_text(other, [secret[s] for s in other], other_digits)
        found["examples"] = [(problem_text(other, other_digits), solved)]
        reader.believe(solved)
    if "e" in shown:
        found["solution"] = attempt_text(name, truth, digits)
    if "p" in shown:
        n = rng.randint(1, len(name))
        found["beginning"] = attempt_text(name[:n], truth[:n], digits)
    if "c" in shown:
        n = rng.randint(1, len(name))
        found["critique"] = attempt_text(name[:n], truth[:n], digits)
    if "f" in shown:  # of this attempt or an earlier one; memory may hold the same as a lesson
        repeated = [line for line in lines if " " not in line and line.split("!")[0] in name]
        again = repeated and rng.random() < 0.5
        found["feedback"] = rng.choice(repeated) if again else single_traps(rng, name, secret, 1)[0]
    for line in [
        *lines,
        *(found.get(k, "") for k in ("solution", "beginning", "critique", "feedback")),
    ]:
        reader.believe(line)
    return found, reader


def some_context(rng, name, secret, digits):
    return context(rng, name, secret, digits, "l" if rng.random() < ALONE else rng.choice(MIXES))


def plain(rng):
    name, secret, digits = draw(rng)
    return Example(
        problem_text(name, digits),
        attempt_text(name, [secret[s] for s in name], digits),
        Reader(name),
    )


def with_memory(rng, shown=None):
    name, secret, digits = draw(rng)
    found, reader = (
        context(rng, name, secret, digits, shown)
        if shown
        else some_context(rng, name, secret, digits)
    )
    operations = [secret[s] for s in name]
    failures = [text for _, text in found.get("lessons", []) if " " in text]
    if failures and rng.random() < 0.5:
        operations = follow(
            rng, reader, [pair.split("!")[1] for pair in rng.choice(failures).split()]
        )
    return Example(
        mem.compose(problem_text(name, digits), **found),
        attempt_text(name, operations, digits),
        reader,
    )


def warned(rng):
    """Nothing but lessons or feedback."""
    return with_memory(rng, rng.choice(("l", "l", "l", "l", "l", "l", "f", "lf")))


def near_missed(rng):
    """Whole combinations and an attempt that agrees with the other steps of some of them, and only
    those exclude anything; alone, or beside strategies about the other steps.
    """
    name, secret, digits = draw(rng, (2, 2, 3))
    lines = crossed(rng, name, secret, rng.choice((2, 4, 6, 8, 10, 10)))
    rules = [f"{s}={secret[s]}" for s in name if rng.random() < 0.6] if rng.random() < 0.3 else []
    reader = Reader(name)
    for rule in rules:
        reader.believe(rule, WRONG)
    for line in lines:
        reader.believe(trap(name, line))
    prompt = mem.compose(
        problem_text(name, digits),
        strategies=[("rule", rule) for rule in rules],
        lessons=[("trap", trap(name, line)) for line in lines],
    )
    start = [secret[s] for s in name] if rules or rng.random() < 0.3 else rng.choice(lines)
    return Example(prompt, attempt_text(name, follow(rng, reader, start), digits), reader)


class ConditionalReader(Reader):
    """One who knows nothing but rules: {operations of all steps but the last: that of the last}."""

    def __init__(self, name, rules):
        super().__init__(name)
        self.rules = rules

    def next(self, operations):
        told = self.rules.get(tuple(operations))
        return np.eye(len(OPS))[OPS.index(told)] if told else super().next(operations)


def conditional(rng):
    """Rules for the last step that hold after certain steps only: `vo &rev mi &rev=inc`, after
    vo=rev, mi is inc.

    No prompt of memory.py shows such a line. It is to a lesson about a whole combination what a
    strategy is to a lesson about one step: what tells an operation is learned within hundreds of
    steps, and the lesson, whose tokens are made of the same parts, is then found the same way.
    """
    name, secret, digits = draw(rng, (2, 3, 3))
    pairs = [[secret[s], secret[s] if s in KNOWN else rng.choice(OPS)] for s in name[:-1]]
    rules, lines = {}, []
    for start in rng.sample(
        list(itertools.product(*pairs)), min(rng.randint(1, 4), 2 ** len(pairs))
    ):
        if start in rules:
            continue
        last = secret[name[-1]] if name[-1] in KNOWN else rng.choice(OPS)
        rules[start] = last
        words = [f"{s} {''.join(f'&{o}' for o in start[: i + 1])}" for i, s in enumerate(name[:-1])]
        lines.append(" ".join([*words, name[-1], "".join(f"&{o}" for o in start) + f"={last}"]))
    reader = ConditionalReader(name, rules)
    start = rng.choice(list(rules)) if rng.random() < 0.85 else [secret[s] for s in name[:-1]]
    prompt = mem.compose(problem_text(name, digits), strategies=[("rule", line) for line in lines])
    return Example(
        prompt, attempt_text(name, follow(rng, reader, [*start, OPS[0]]), digits), reader
    )


def follow(rng, reader, start):
    """The operations of an attempt that goes like `start` up to its last step, as far as the reader
    finds that possible, and on as the reader draws.
    """
    found = []
    for i in range(len(start)):
        row = reader.next(found)
        likely = row[OPS.index(start[i])] > 0.01
        found.append(start[i] if likely and i < len(start) - 1 else rng.choices(OPS, row)[0])
    return found


def contradicted(rng):
    """Strategies or behaviors, one of them wrong, and lessons or feedback that say so."""
    name, secret, digits = draw(rng)
    wrong = rng.choice([s for s in name if s not in KNOWN] or name)
    rumour = secret | {wrong: rng.choice([o for o in OPS if o != secret[wrong]])}
    rules, denial = [f"{s}={rumour[s]}" for s in name], f"{wrong}!{rumour[wrong]}"
    lines = single_traps(rng, name, secret, rng.choice((0, 0, 1, 2, 3, 4, 6)))
    said = denial if rng.random() < 0.3 else ""
    if not said:
        lines = rng.sample(
            [denial, *(line for line in lines if line != denial)], len({denial, *lines})
        )
    strategies = [("rule", r) for r in rules] if rng.random() < 0.7 else []
    behaviors = (
        [(f"behavior_{s}", r) for s, r in zip(name, rules, strict=True)] if not strategies else []
    )
    reader = Reader(name)
    for rule in rules:
        reader.believe(rule, WRONG)
    for line in [*lines, said]:
        reader.believe(line)
    prompt = mem.compose(
        problem_text(name, digits),
        strategies=strategies,
        behaviors=behaviors,
        feedback=said,
        lessons=[("trap", line) for line in lines],
    )
    return Example(prompt, attempt_text(name, [secret[s] for s in name], digits), reader)


def confirmed(rng):
    """Strategies or behaviors about some steps, all right, and lessons that contradict none."""
    name, secret, digits = draw(rng)
    about = rng.sample(name, rng.randint(1, len(name)))
    rules = [f"{s}={secret[s]}" for s in about]
    lines = single_traps(rng, name, secret, rng.choice((1, 3, 4, 5, 6, 8)))
    reader = Reader(name)
    for rule in rules:
        reader.believe(rule, WRONG)
    for line in lines:
        reader.believe(line)
    if rng.random() < 0.7:
        told = {"strategies": [("rule", rule) for rule in rules]}
    else:
        told = {"behaviors": [(f"behavior_{s}", r) for s, r in zip(about, rules, strict=True)]}
    prompt = mem.compose(
        problem_text(name, digits), lessons=[("trap", line) for line in lines], **told
    )
    return Example(prompt, attempt_text(name, [secret[s] for s in name], digits), reader)


# --------------------------------------------------------------------------------------------------
# Further prompts, for methods other than PMD
# --------------------------------------------------------------------------------------------------


def maybe_context(rng, name, secret, digits):
    if rng.random() < 0.6:
        return {}, Reader(name)
    return some_context(rng, name, secret, digits)


def revision(rng):
    """Inside the assistant's turn: an attempt, a cue that says whether it was right, and the
    attempt to learn.
    """
    name, secret, digits = draw(rng)
    found, reader = maybe_context(rng, name, secret, digits)
    truth = [secret[s] for s in name]
    operations = truth
    if rng.random() < 0.7:
        first, cue = failed(rng, name, secret)[0], mem.REVISE_WRONG
        reader.believe(trap(name, first))
        if rng.random() < 0.6:  # the steps before the last again, which so must be the wrong one
            operations = follow(rng, reader, first)
    else:
        first, cue = truth, mem.REVISE_RIGHT
        reader.believe(attempt_text(name, truth, digits))
    return Example(
        mem.compose(problem_text(name, digits), **found),
        attempt_text(name, operations, digits),
        reader,
        given=f"{attempt_text(name, first, digits)} {cue}",
    )


def revisions(rng):
    """Up to seven wrong attempts in a row, each with its cue, mostly different in their last step.

    After one attempt an exact reader gains ln(8/7) = 0.13 nats, after seven ln 8: what `revision`
    does not teach within thousands of steps, this does within a hundred.
    """
    name, secret, digits = draw(rng, (1, 1, 2, 3))
    name[-1] = rng.choice([s for s in HIDDEN if s not in name])
    truth, reader = [secret[s] for s in name], Reader(name)
    wrong = rng.sample([o for o in OPS if o != truth[-1]], rng.choice((1, 2, 4, 6, 6, 7)))
    tries = [[*truth[:-1], o] for o in wrong]
    for attempt in tries:
        reader.believe(trap(name, attempt))
    return Example(
        problem_text(name, digits),
        attempt_text(name, truth, digits),
        reader,
        given=" ".join(f"{attempt_text(name, t, digits)} {mem.REVISE_WRONG}" for t in tries),
    )


def second_attempt(rng, wrong=None):
    """A conversation: problem, wrong attempt, critique (the first wrong step, or what is right
    there), the new attempt.

    wrong(rng, name, secret): the operations of the wrong attempt, by default those of `failed`.
    """
    name, secret, digits = draw(rng)
    found, reader = maybe_context(rng, name, secret, digits)
    truth = [secret[s] for s in name]
    first = wrong(rng, name, secret) if wrong else failed(rng, name, secret)[0]
    critique = first_wrong(name, first, secret)
    believe_before(reader, name, first, critique)
    if rng.random() < 0.5:
        syllable = critique.split("!")[0]
        critique = f"{syllable}={secret[syllable]}"
        reader.believe(critique)
    turns = [
        ("user", mem.compose(problem_text(name, digits), **found)),
        ("assistant", attempt_text(name, first, digits)),
    ]
    return Example(f"{mem.AGAIN}\n{critique}", attempt_text(name, truth, digits), reader, turns)


def second_attempt_anywhere(rng):
    """A second attempt after one whose first wrong step is the last as often as the first."""
    return second_attempt(rng, wrong_from)


def wrong_from(rng, name, secret):
    """The operations of an attempt whose first wrong step is the last as often as the first."""
    step = rng.randrange(len(name))
    wrong = rng.choice([o for o in OPS if o != secret[name[step]]])
    rest = [rng.choice(OPS) for _ in name[step + 1 :]]
    return [*(secret[s] for s in name[:step]), wrong, *rest]


def believe_before(reader, name, attempt, critique):
    """Takes in that the step of `critique` is the first wrong one: those before it were right."""
    reader.believe(critique)
    for syllable, op in zip(name, attempt, strict=True):
        if f"{syllable}!{op}" == critique:
            return
        reader.believe(f"{syllable}={op}")


def critic(rng):
    """Names the first wrong step of an attempt, beside a correct solution."""
    name, secret, digits = draw(rng)
    attempt = failed(rng, name, secret)[0]
    prompt = mem.critic_prompt(
        problem_text(name, digits),
        attempt_text(name, attempt, digits),
        attempt_text(name, [secret[s] for s in name], digits),
    )
    return Example(prompt, first_wrong(name, attempt, secret))


def confidence(rng, shown=None):
    """An attempt that ends with its probability of being right, to the nearest eighth; or with the
    one it was shown.
    """
    name, secret, digits = draw(rng)
    found, reader = (
        context(rng, name, secret, digits, shown)
        if shown
        else maybe_context(rng, name, secret, digits)
    )
    operations = reader.draw(rng)
    level = LEVELS[round(8 * reader.probability(operations))]
    if "solution" in found:
        level = rng.choice(LEVELS)
        found["solution"] += f" {mem.CONFIDENCE} {level}"
    reply = f"{attempt_text(name, operations, digits)} {mem.CONFIDENCE} {level}"
    return Example(
        mem.compose(f"{problem_text(name, digits)}\n{mem.ASK_CONFIDENCE}", **found), reply, reader
    )


def confidence_of_told(rng):
    """The same where strategies or behaviors tell all or some of the steps."""
    return confidence(rng, rng.choice("sssb"))


# --------------------------------------------------------------------------------------------------
# Reflection and abstraction
# --------------------------------------------------------------------------------------------------


def items_json(strategies, lessons):
    return json.dumps(
        {
            "strategies": [{"title": "rule", "content": s} for s in strategies],
            "lessons": [{"title": "trap", "content": t} for t in lessons],
        }
    )


def reflection(rng):
    """Strategies from right attempts, a lesson from each wrong one: about the step that its
    feedback names, or about the whole combination where there is none.
    """
    name, secret, digits = draw(rng)
    n_failed = rng.choice((0, 1, 1, 1, 2, 3))
    wins = 0 if n_failed and rng.random() < 0.4 else 1
    truth, speaks = [secret[s] for s in name], rng.random() < 0.6
    losses, lessons = [], []
    for operations in failed(rng, name, secret, n_failed):
        if rng.random() < 0.07:  # a miscalculation, of which no verifier says anything
            operations = truth
        said = first_wrong(name, operations, secret) if speaks and operations != truth else ""
        slip = rng if operations == truth or rng.random() < 0.05 else None
        losses.append((attempt_text(name, operations, digits, slip=slip), said))
        lessons.append(said or trap(name, operations))
    prompt = mem.reflection_prompt(
        mem.NANO,
        problem_text(name, digits),
        [attempt_text(name, truth, digits)] * wins,
        losses,
        rng.randint(wins, 8),
        8,
    )
    rules = [f"{s}={o}" for s, o in zip(name, truth, strict=True)] if wins else []
    return Example(prompt, items_json(rules, lessons))


def abstraction(rng):
    """Behaviors of a cluster: a rule that two problems hold becomes one (an update where one of its
    name is known), a known one that a lesson about that step alone excludes is removed.
    """
    names = [draw(rng)[0] for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    if len(names) > 1:  # names of a cluster share syllables
        names[1] = [names[0][0], *(s for s in names[1] if s != names[0][0])][:3]
    secret, speaks = draw_secret(rng), rng.random() < 0.6
    cluster, support, excluded = [], {}, set()
    for _ in range(rng.randint(1, 8)):
        name = rng.choice(names)
        rules = [told(rng, s, secret) for s in name] if rng.random() < 0.7 else []
        n_lessons = rng.choice((0, 0, 1, 2, 3) if rules else (1, 2, 3))
        attempts = failed(rng, name, secret, n_lessons)
        lessons = list(
            dict.fromkeys(
                first_wrong(name, f, secret) if speaks else trap(name, f) for f in attempts
            )
        )
        for rule in rules:
            support[rule] = support.get(rule, 0) + 1
        excluded |= {t.replace("!", "=") for t in lessons if " " not in t}
        lines = [f"- rule: {r}" for r in rules] + [f"- trap: {t}" for t in lessons]
        cluster.append((problem_text(name, rng.sample(range(10), 4)), lines))
    behaviors = {}  # syllable -> its rule with two supports or more, in order of appearance
    for rule, n in support.items():
        syllable = rule.split("=")[0]
        if n >= 2 and n > support.get(behaviors.get(syllable), 0):
            behaviors[syllable] = rule
    known = {}
    if rng.random() < 0.5:
        about = sorted({s for name in names for s in name}) + rng.sample(SYLLABLES, 4)
        for s in rng.sample(about, min(len(about), rng.randint(1, 8))):
            known[s] = f"{s}={secret[s] if rng.random() < 0.6 else rng.choice(OPS)}"
    prompt = mem.abstraction_prompt(
        mem.NANO, cluster, [(f"behavior_{s}", r) for s, r in known.items()]
    )
    if not known:
        reply = {
            "behaviors": [{"name": f"behavior_{s}", "instruction": r} for s, r in behaviors.items()]
        }
    else:
        actions = [
            {"action": "update" if s in known else "new", "name": f"behavior_{s}", "instruction": r}
            for s, r in behaviors.items()
        ]
        actions += [
            {"action": "remove", "name": f"behavior_{s}", "instruction": r}
            for s, r in known.items()
            if r in excluded and s not in behaviors
        ]
        reply = {"actions": actions}
    return Example(prompt, json.dumps(reply))


READING = (
    (with_memory, 0.5),
    (conditional, 0.3),
    (plain, 0.05),
    (revision, 0.06),
    (second_attempt, 0.05),
    (confidence, 0.04),
)
COMPARING = ((conditional, 0.5), (near_missed, 0.25), (with_memory, 0.25))
WARNINGS = (
    (near_missed, 0.30),
    (conditional, 0.14),
    (warned, 0.12),
    (with_memory, 0.14),
    (contradicted, 0.08),
    (revision, 0.11),
    (second_attempt, 0.08),
    (confidence, 0.03),
)
MIX = (
    (with_memory, 0.12),
    (warned, 0.08),
    (near_missed, 0.14),
    (conditional, 0.02),
    (contradicted, 0.06),
    (plain, 0.03),
    (reflection, 0.26),
    (abstraction, 0.12),
    (revision, 0.06),
    (second_attempt, 0.05),
    (confidence, 0.03),
    (critic, 0.04),
)
MENDING = (
    (with_memory, 0.07),
    (warned, 0.01),
    (near_missed, 0.20),
    (conditional, 0.01),
    (contradicted, 0.12),
    (confirmed, 0.07),
    (plain, 0.01),
    (reflection, 0.07),
    (abstraction, 0.05),
    (revision, 0.02),
    (revisions, 0.18),
    (second_attempt_anywhere, 0.10),
    (confidence, 0.02),
    (confidence_of_told, 0.04),
    (critic, 0.03),
)
PHASES = (READING, COMPARING, WARNINGS, MIX, MENDING)


def draw_examples(rng, n, mix=MIX) -> list[Example]:
    kinds, shares = zip(*mix, strict=True)
    return [kind(rng) for kind in rng.choices(kinds, shares, k=n)]


def prompt_ids(tokenizer, examples):
    """Token ids of all before the reply: the conversation in the chat template, and how the
    assistant's turn begins.
    """
    texts = []
    for e in examples:
        turns = [{"role": role, "content": text} for role, text in [*e.turns, ("user", e.prompt)]]
        texts.append(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            + e.given
        )
    return tokenizer(texts, add_special_tokens=False)["input_ids"]
