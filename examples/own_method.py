"""Your own method: replace one phase of the loop and run it under the same conditions as the others.

    python examples/own_method.py --seed 0          # takes every flag of pmd.py; compare with `python pmd.py --seed 0`

This one asks whether successes need a teacher at all: only failed rollouts are supervised. Everything else is PMD, the
memory's growth included. If it deserves a name, a value of `--method` is the next step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pmd

condition = pmd.condition


def condition_failures_only(rollouts, memory, tokenizer, step, cfg):
    condition(rollouts, memory, tokenizer, step, cfg)
    for r in rollouts:
        if r.reward > 0.5:
            r.teacher_ids, r.teacher_prompt = [], ""


pmd.condition = condition_failures_only

if __name__ == "__main__":
    pmd.main()
