"""Your own task: a folder with two JSON-lines files. This one asks for sums of two one-digit
numbers.

python examples/sums.py sums
python pmd.py --model DIR --task sums --max_completion 64 --max_reprompt 4096
"""

import argparse
import json
import random
from pathlib import Path

parser = argparse.ArgumentParser(description="Writes a task: sums of two one-digit numbers.")
parser.add_argument("folder", type=Path, help="the folder that the task is written to")
folder = parser.parse_args().folder
folder.mkdir(parents=True, exist_ok=True)
pairs = random.Random(0).sample([(a, b) for a in range(10) for b in range(10)], 100)
for split, part in (("train", pairs[:70]), ("test", pairs[70:])):
    rows = (
        {
            "id": f"{a}+{b}",
            "prompt": f"What is {a} + {b}?",
            "answer": str(a + b),
            "verifier": "last_number",
        }
        for a, b in part
    )
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
