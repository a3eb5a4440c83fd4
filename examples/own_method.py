"""Your own method: a file with a class Method that replaces what it changes. Every flag of pmd.py
works with it.

    python pmd.py --method examples/own_method.py --seed 0        # compare with `python pmd.py
                                                                  --seed 0`
    python pmd.py --compare pmd,examples/own_method.py            # in one figure, on equal budgets

This one asks whether successes need a teacher at all: only failed rollouts are supervised.
Everything else is PMD, the memory's growth included. In methods/ a file needs no path:
methods/mine.py is `--method mine`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pmd


class Method(pmd.PMD):
    def condition(self, step, rollouts):
        rows = super().condition(step, rollouts)
        for r in rows:
            if r.reward > 0.5:
                r.teacher_ids, r.teacher_prompt = [], ""
        return rows


if __name__ == "__main__":  # python examples/own_method.py is short for the first command
    sys.argv[1:1] = ["--method", __file__]
    pmd.main()
