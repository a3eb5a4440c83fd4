"""SciKnowEval in SDPO's files, or from the Hub, with its data card."""

import hashlib
import json
import re
import tempfile
from collections import Counter
from pathlib import Path

from tasks.files import cause, table_rows
from tasks.problem import Problem
from tasks.reading import read_problem, read_problems

SCIKNOWEVAL_HUB = "hicai-zju/SciKnowEval"
# Tab. 10
SCIKNOWEVAL = {
    "biology": (450, 50),
    "chemistry": (1890, 210),
    "material": (841, 94),
    "physics": (720, 80),
}
# see digest
SDPO_SPLITS = {
    "biology": "9349f38c83f7d86c",
    "chemistry": "e2254d6e32009a6f",
    "material": "2391f902dc62214b",
    "physics": "9e5f0145a7a5f98b",
}
# SciKnowEval's items on the Hub have no system message. This one has the published form in our own
# words (a deviation); SDPO's files bring the published one.
HUB_SYSTEM = """
You see a question and its options, one of which is right. Write your reply in this form:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

The answer is the letter of the right option (A, B, C, or D) alone, without its text. If you \
choose "A", it is:
<answer>
A
</answer>
"""
REASON = "\nPlease reason step by step."
HUB_COLUMNS = {"question", "choices", "answerKey", "type", "domain", "details"}


def from_sciknoweval(row) -> dict:
    """Turns an item of SDPO's SciKnowEval files into a row of our schema.

    Its prompt ends in lines `A: text` and holds the published form.
    Raises ValueError if a key is missing, or if the answer is none of the options.
    """
    missing = [key for key in ("idx", "prompt", "answer", "system") if row.get(key) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given")
    letters = re.findall(r"^([A-Z]): ", str(row["prompt"]), re.MULTILINE)
    if row["answer"] not in letters:
        raise ValueError(
            f"the answer key {row['answer']!r} is none of the options {', '.join(letters)}"
        )
    return {
        "id": str(row["idx"]),
        "prompt": row["prompt"],
        "answer": row["answer"],
        "verifier": "choice",
        "system": row["system"],
    }


def sciknoweval_from_hub(domain, source="") -> list[list[Problem]]:
    """Rebuilds train and test of a domain as SDPO built them: L3, multiple choice, a split of 90/10
    by `datasets` with seed 42.

    source: the Hub's name of the data set, or a folder in its layout: a card (README.md) that names
    the files, and those. As in SDPO's loader no configuration is named, since the card has one with
    all domains, v2. It ran on such a folder with the card's front matter and the published columns,
    not on the Hub itself.
    Raises ValueError if they can't be loaded, or lack a column or items.
    """
    import datasets  # here: it takes a second, and no other task needs it

    folder, source = source, str(source or SCIKNOWEVAL_HUB)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            cache = {}
            if folder:  # the common cache takes two folders with one card for the same data
                cache = {"cache_dir": scratch, "keep_in_memory": True}
            table = datasets.load_dataset(source, split="test", **cache)
    except Exception as error:
        raise ValueError(
            f"sciknoweval/{domain} needs --data, a folder with {domain}/train.json and test.json"
            f" (SDPO's repository has it as datasets/sciknoweval), or the Hub's {source}, which"
            f" can't be loaded: {cause(error)}"
        ) from error
    missing = HUB_COLUMNS - set(table.column_names)
    if missing:
        raise ValueError(f"{source} has no column {', '.join(sorted(missing))}")

    def wanted(row):
        details = row["details"]
        return (
            str(row["domain"]).lower() in (domain, f"{domain}s")
            and isinstance(details, dict)
            and details.get("level") == "L3"
            and row["type"] in ("mcq-4-choices", "mcq-2-choices")
        )

    table = table.select([n for n, row in enumerate(table) if wanted(row)])
    if len(table) < 2:
        raise ValueError(
            f"{source} has {len(table)} multiple-choice items of level L3 in {domain}: too few for"
            " two splits"
        )
    numbered = table.add_column("idx", list(range(len(table))))
    parts = numbered.train_test_split(test_size=0.1, seed=42)

    def problem(row):
        item = {"idx": row["idx"], "answer": row["answerKey"], "system": HUB_SYSTEM}
        try:
            item["prompt"] = f"{question_with_options(row)}{REASON}"
            return read_problem(from_sciknoweval(item))
        except ValueError as error:
            raise ValueError(
                f"{source}, item {row['idx']} of {domain} (L3, multiple choice): {error}"
            ) from error

    return [[problem(row) for row in parts[split]] for split in ("train", "test")]


def question_with_options(row) -> str:
    """Writes an item of the Hub as SDPO does, with `A: text` on a line.

    Raises ValueError if it has no question, or an option is not whole.
    """
    choices = row["choices"] if isinstance(row["choices"], dict) else {}
    labels, texts = choices.get("label") or [], choices.get("text") or []
    if not row["question"] or not labels or len(labels) != len(texts) or None in (*labels, *texts):
        raise ValueError("it has to have a question, and choices with as many texts as labels")
    options = [f"{label}: {text}" for label, text in zip(labels, texts, strict=True)]
    return "\n".join([row["question"], "", *options])


def defects(train, test) -> list[list[str]]:
    """Returns the known defect of each item of train and of test, or "", from the items alone."""

    def parts(p):
        stem, *options = re.split(r"^[A-Z]: ", p.prompt.removesuffix(REASON), flags=re.MULTILINE)
        return re.sub(r"\d+(\.\d+)?", "#", stem.strip()), [option.strip() for option in options]

    def defect(p, prompts, stems):
        stem, options = parts(p)
        if re.search("(?i)val[ae]nce.(comp|elec)", p.prompt):
            return "noisy subtask: valence electrons (many keys don't fit the numbers given)"
        if len(set(options)) < len(options):
            return "repeated options"
        if p.prompt in prompts:
            return "leaked: the very item is in train"
        if stem in stems:
            return "near-duplicate: a stem of train, with other numbers or options"
        return ""

    prompts, stems = {p.prompt for p in train}, {parts(p)[0] for p in train}
    return [[defect(p, (), ()) for p in train], [defect(p, prompts, stems) for p in test]]


def digest(splits) -> str:
    """Returns a digest of the ids, prompts and answers of splits, in their order.

    The system messages are left out: they may be in our words.
    """
    items = [[[p.id, p.prompt, p.answer] for p in split] for split in splits]
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]


def load_sciknoweval(name, data, exclude_flagged):
    """Returns (name, train, test, card) of a domain.

    data: a folder with SDPO's files, or one like the Hub's, or "" for the Hub.
    Raises ValueError if there is no such domain, or if its items are not as many as published.
    """
    domain = name.partition("/")[2]
    if domain not in SCIKNOWEVAL:
        raise ValueError(f"sciknoweval has no domain {domain!r}; it has {', '.join(SCIKNOWEVAL)}")
    folder = Path(data) / domain
    if data and folder.is_dir():
        splits = [
            read_problems(folder / f"{split}.json", from_sciknoweval, table_rows)
            for split in ("train", "test")
        ]
    elif not data or (Path(data) / "README.md").is_file():  # the Hub's, or a copy of its repository
        splits = sciknoweval_from_hub(domain, data)
    else:
        raise ValueError(
            f"{name} needs --data, a folder with {domain}/train.json and test.json; {folder} is"
            " none"
        )
    sizes = tuple(len(split) for split in splits)
    if sizes != SCIKNOWEVAL[domain]:
        raise ValueError(
            f"{name} has {sizes[0]} train and {sizes[1]} test items, but {SCIKNOWEVAL[domain][0]}"
            f" and {SCIKNOWEVAL[domain][1]} were published; for items of your own, give --task a"
            " folder"
        )
    flagged = defects(*splits)
    lines = [
        f"{name}: {sizes[0]} train and {sizes[1]} test items of HICAI-ZJU/SciKnowEval (L3), as"
        " split by SDPO"
    ]
    for split, flags in zip(("train", "test"), flagged, strict=True):
        counts = Counter(flag for flag in flags if flag)
        lines += [f"  {split}: {n} {kind}" for kind, n in sorted(counts.items())]
    if digest(splits) != SDPO_SPLITS[domain]:
        lines += [
            "  NOT to the letter the items, or not in the splits, that SDPO and the paper used"
        ]
    if not exclude_flagged:
        lines += ["  flagged items are used; --exclude_flagged leaves them out"]
        return name, *splits, "\n".join(lines)
    lines += ["  flagged items are excluded"]

    def unflagged(problems, flags):
        return [p for p, flag in zip(problems, flags, strict=True) if not flag]

    train, test = map(unflagged, splits, flagged)
    name = f"{name} (without flagged items, {len(test)} test problems)"
    return name, train, test, "\n".join(lines)
