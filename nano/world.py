"""The embedded worlds: syllables that hide operations on digits, the texts about them, and task
files.

A problem is a name of one to three syllables and four distinct digits: `Apply vo mi to 3 1 7 4`.
Each syllable hides one of eight operations on the digits. An answer repeats the digits, then names
the operation it uses for each syllable and writes the digits after it: `3 1 7 4 vo vo=rev 4 7 1 3
mi mi=inc 5 8 2 4`. Which syllable hides which operation is drawn per WORLD, after the model has
been trained, so that only experience can reveal it; names share syllables, so what one problem
teaches holds for others.

The verifier compares the digits after EVERY step: with the final digits alone most successes of
long names would be accidents, and a memory turns accidents into rules. In a world that speaks it
also says which step was the first wrong one, by the operation that was named there: `mi!inc`. In a
plain world it says nothing.
"""

import json
import random
from collections import Counter

HIDDEN = "ba de fi go ha ju ka le mi no pu ra se ti vo wu xa ye zi lo ku ma ne ro".split()
# In the weights after pre-training, and in no world: so the model learns to hold facts in its
# weights and to keep them beside a memory
KNOWN = {"ki": "rev", "zo": "inc", "du": "flip", "pa": "dec"}
SYLLABLES = HIDDEN + list(KNOWN)
OPERATIONS = {
    "rev": lambda d: d[::-1],
    "rol": lambda d: d[1:] + d[:1],
    "ror": lambda d: d[-1:] + d[:-1],
    "swap": lambda d: [d[1], d[0], d[3], d[2]],
    "flip": lambda d: d[2:] + d[:2],
    "inc": lambda d: [(x + 1) % 10 for x in d],
    "dec": lambda d: [(x - 1) % 10 for x in d],
    "neg": lambda d: [9 - x for x in d],
}
NAMES = ((1, 8), (2, 14), (3, 18))  # names of each length in a world: 3% of uniform guesses succeed
INPUTS = 4  # inputs per name, in train and again in test


def problem_text(name, digits):
    return f"Apply {' '.join(name)} to {' '.join(map(str, digits))}"


def attempt_text(name, operations, digits, slip=None):
    """The completion that applies `operations` in turn; with `slip` a rng that miscalculates one
    step.
    """
    words, wrong_at = list(map(str, digits)), slip.randrange(len(name)) if slip else -1
    for i, (syllable, op) in enumerate(zip(name, operations, strict=True)):
        digits = OPERATIONS[op](digits)
        if i == wrong_at:
            digits = [(x + 1) % 10 if j == 0 else x for j, x in enumerate(digits)]
        words += [syllable, f"{syllable}={op}", *map(str, digits)]
    return " ".join(words)


def answer_text(name, operations, digits):
    """What the verifier compares: the completion with the names of the operations left open."""
    return " ".join(
        w.split("=")[0] + "=*" if "=" in w else w
        for w in attempt_text(name, operations, digits).split()
    )


def trap(name, operations):
    """A lesson on a failed attempt: of a whole combination (at least one of its steps is wrong), or
    of one step.
    """
    return " ".join(f"{s}!{o}" for s, o in zip(name, operations, strict=True))


def make_world(seed, names=NAMES, speaks=True):
    """(train rows, test rows): 40 names, each with 4 train and 4 other test inputs, and the secret
    map behind them.

    Syllables come in three tiers of eight; the first alone forms the one-syllable names, the second
    appears only in longer names, the third only in the longest: a natural curriculum. A row's
    `hidden` is read by diagnostics, and by a verifier that speaks. Worlds of one seed that speak
    and that do not differ in nothing else.

    names: (length, how many) pairs by length. speaks: whether the verifier gives feedback.
    """
    rng = random.Random(f"nano world {seed}")
    order = rng.sample(HIDDEN, len(HIDDEN))
    secret = {s: rng.choice(list(OPERATIONS)) for s in HIDDEN}
    tiers = [order[:8], order[8:16], order[16:]]
    counts, names = names, []
    for length, _ in counts:
        pool = sum(tiers[: length - 1], [])
        while len(names) < sum(c for n, c in counts if n <= length):
            # every syllable of the tier in turn, with the partners used least: each is shared
            newest = tiers[length - 1][len(names) % 8]
            used = Counter(sum(names, []))
            name = sorted(pool, key=lambda s: (used[s], rng.random()))[: length - 1] + [newest]
            rng.shuffle(name)
            if name not in names:
                names.append(name)
    train, test = [], []
    for name in names:
        drawn = set()
        while len(drawn) < 2 * INPUTS:
            drawn.add(tuple(rng.sample(range(10), 4)))
        for i, digits in enumerate(sorted(drawn, key=lambda d: rng.random())):
            operations = [secret[s] for s in name]
            row = {
                "id": f"{'-'.join(name)}-{''.join(map(str, digits))}",
                "prompt": problem_text(name, list(digits)),
                "answer": answer_text(name, operations, list(digits)),
                "verifier": "steps",
                "hidden": " ".join(f"{s}={o}" for s, o in zip(name, operations, strict=True)),
            }
            if speaks:
                row["feedback"] = True
            (train if i < INPUTS else test).append(row)
    return train, test


def write_world(seed, folder, **knobs):
    """The files train.jsonl and test.jsonl of a task folder; knobs as for make_world."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(("train", "test"), make_world(seed, **knobs), strict=True):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
