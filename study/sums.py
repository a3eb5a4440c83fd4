"""The task of the demonstration on real text: sums and differences of two one-digit
numbers, as the library reasoning-gym asks for them.

    pip install reasoning-gym==0.1.25
    python study/sums.py sums

Writes a folder of JSON lines: 32 problems to train on, which 30 steps of 4 see almost four times,
and 64 others to test on.
"""

import argparse
import json
from pathlib import Path

import reasoning_gym

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("folder", type=Path)
folder = parser.parse_args().folder
asked = reasoning_gym.create_dataset(
    "chain_sum", size=2000, seed=0, min_terms=2, max_terms=2, min_digits=1, max_digits=1
)
problems = list({item["question"]: item["answer"] for item in asked}.items())
folder.mkdir(parents=True, exist_ok=True)
for split, part in (("train", problems[:32]), ("test", problems[32:96])):
    with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
        for question, answer in part:
            row = {"id": question.split(": ")[1].rstrip(" ="), "prompt": question, "answer": answer}
            file.write(json.dumps(row | {"verifier": "last_number"}) + "\n")
