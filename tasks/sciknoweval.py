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
SCIKNOWEVAL = {
    "biology": (450, 50),
    "chemistry": (1890, 210),
    "material": (841, 94),
    "physics": (720, 80),
}  # Tab. 10
SDPO_SPLITS = {
    "biology": "9349f38c83f7d86c",
    "chemistry": "e2254d6e32009a6f",
    "material": "2391f902dc62214b",
    "physics": "9e5f0145a7a5f98b",
}  # see digest
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

The answer is the letter of the right option (A, B, C, or D) alone, without its text. If you choose "A", it is:
<answer>
A
</answer>
"""
REASON = "\nPlease reason step by step."


def from_sciknoweval(row) -> dict:
    """An item of SDPO's SciKnowEval files in our schema; its prompt ends in lines `A: text` and
    holds the published form.
    """
    if missing := [k for k in ("idx", "prompt", "answer", "system") if row.get(k) is None]:
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
    """Train and test of a domain, rebuilt as SDPO built its files: L3, multiple choice, 90/10 by
    `datasets` with seed 42.

    source: the Hub's name of the data set, or a folder in its layout: a card (README.md) that names
    the files, and those. As in SDPO's loader no configuration is named, since the card has one with
    all domains, v2. Not run on the Hub itself, which was out of reach; run on such a folder, with
    the card's front matter and the published columns.
    """
    import datasets  # here: it takes a second, and no other task needs it

    folder, source = source, str(source or SCIKNOWEVAL_HUB)
    try:
        with (
            tempfile.TemporaryDirectory() as scratch
        ):  # the cache takes two folders with one card for the same data
            cache = {"cache_dir": scratch, "keep_in_memory": True} if folder else {}
            table = datasets.load_dataset(source, split="test", **cache)
    except Exception as error:
        raise ValueError(
            f"sciknoweval/{domain} needs --data, a folder with {domain}/train.json and test.json"
            f" (SDPO's repository has it as datasets/sciknoweval), or the Hub's {source}, which"
            f" can't be loaded: {cause(error)}"
        ) from error
    if missing := {"question", "choices", "answerKey", "type", "domain", "details"} - set(
        table.column_names
    ):
        raise ValueError(f"{source} has no column {', '.join(sorted(missing))}")

    def wanted(row):
        level = row["details"].get("level") if isinstance(row["details"], dict) else None
        return (
            str(row["domain"]).lower() in (domain, f"{domain}s")
            and level == "L3"
            and row["type"] in ("mcq-4-choices", "mcq-2-choices")
        )

    table = table.select([n for n, row in enumerate(table) if wanted(row)])
    if len(table) < 2:
        raise ValueError(
            f"{source} has {len(table)} multiple-choice items of level L3 in {domain}: too few for"
            " two splits"
        )
    parts = table.add_column("idx", list(range(len(table)))).train_test_split(
        test_size=0.1, seed=42
    )

    def problem(row):
        try:
            prompt = f"{question_with_options(row)}{REASON}"
            return read_problem(
                from_sciknoweval(
                    {
                        "idx": row["idx"],
                        "prompt": prompt,
                        "answer": row["answerKey"],
                        "system": HUB_SYSTEM,
                    }
                )
            )
        except ValueError as error:
            raise ValueError(
                f"{source}, item {row['idx']} of {domain} (L3, multiple choice): {error}"
            ) from error

    return [[problem(row) for row in parts[split]] for split in ("train", "test")]


def question_with_options(row) -> str:
    """An item of the Hub's as SDPO writes it, `A: text` on a line. ValueError where it has no
    question or whole options.
    """
    choices = row["choices"] if isinstance(row["choices"], dict) else {}
    labels, texts = choices.get("label") or [], choices.get("text") or []
    if not row["question"] or not labels or len(labels) != len(texts) or None in (*labels, *texts):
        raise ValueError("it has to have a question, and choices with as many texts as labels")
    return f"{row['question']}\n\n" + "\n".join(
        f"{label}: {text}" for label, text in zip(labels, texts, strict=True)
    )


def defects(train, test) -> list[list[str]]:
    """For train and for test: what is known to be wrong with each item of SciKnowEval, or "", found
    in the items alone.
    """

    def parts(p):
        stem, *options = re.split(r"^[A-Z]: ", p.prompt.removesuffix(REASON), flags=re.MULTILINE)
        return re.sub(r"\d+(\.\d+)?", "#", stem.strip()), [option.strip() for option in options]

    def defect(p, prompts, stems):
        stem, options = parts(p)
        noisy = re.search("(?i)val[ae]nce.(comp|elec)", p.prompt)
        return (
            "noisy subtask: valence electrons (many keys don't fit the numbers given)"
            if noisy
            else (
                "repeated options"
                if len(set(options)) < len(options)
                else (
                    "leaked: the very item is in train"
                    if p.prompt in prompts
                    else (
                        "near-duplicate: a stem of train, with other numbers or options"
                        if stem in stems
                        else ""
                    )
                )
            )
        )

    prompts, stems = {p.prompt for p in train}, {parts(p)[0] for p in train}
    return [[defect(p, (), ()) for p in train], [defect(p, prompts, stems) for p in test]]


def digest(splits) -> str:
    """Of the ids, prompts and answers of splits, in their order; the system messages may be in our
    words.
    """
    items = [[[p.id, p.prompt, p.answer] for p in split] for split in splits]
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]


def load_sciknoweval(name, data, exclude_flagged):
    """(name, train, test, card) of a domain, from SDPO's files in the folder `data` or from the
    Hub.
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
    if (sizes := tuple(map(len, splits))) != SCIKNOWEVAL[domain]:
        raise ValueError(
            f"{name} has {sizes[0]} train and {sizes[1]} test items, but {SCIKNOWEVAL[domain][0]}"
            f" and {SCIKNOWEVAL[domain][1]} were published; for items of your own, give --task a"
            " folder"
        )
    found = defects(*splits)
    lines = [
        f"{name}: {sizes[0]} train and {sizes[1]} test items of HICAI-ZJU/SciKnowEval (L3), as"
        " split by SDPO"
    ]
    for split, flags in zip(("train", "test"), found, strict=True):
        lines += [
            f"  {split}: {n} {kind}" for kind, n in sorted(Counter(filter(None, flags)).items())
        ]
    if digest(splits) != SDPO_SPLITS[domain]:
        lines += [
            "  NOT to the letter the items, or not in the splits, that SDPO and the paper used"
        ]
    lines += [
        "  flagged items are"
        f" {'excluded' if exclude_flagged else 'used; --exclude_flagged leaves them out'}"
    ]
    if exclude_flagged:
        splits = [
            [p for p, flag in zip(split, flags, strict=True) if not flag]
            for split, flags in zip(splits, found, strict=True)
        ]
        name = f"{name} (without flagged items, {len(splits[1])} test problems)"
    return name, *splits, "\n".join(lines)
