"""Measures the seconds of a step by phase, and counts the tokens that models pass forward in it."""

import contextlib
import time
from collections import Counter

import torch


class Clock:
    """Counts seconds by name, each second once: an inner clock stops the one around it."""

    def __init__(self):
        self.seconds = Counter()
        self.tokens = Counter()
        self.running = []  # the names of the clocks, the innermost last
        self.peak = 0  # bytes of the GPU, over all processes

    @contextlib.contextmanager
    def __call__(self, name):
        self._turn()
        self.running.append(name)
        try:
            yield
        finally:
            self._turn()
            self.running.pop()

    def _turn(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or the next name would pay for this one's kernels
            # torch's own count would hold the memory that a sleeping vLLM has given back; here,
            # at the end of a phase, torch still keeps all that it took in it
            free, total = torch.cuda.mem_get_info()
            self.peak = max(self.peak, total - free)
        now = time.perf_counter()
        if self.running:  # all of an evaluation is its own, as it is for tokens
            name = "evaluate" if "evaluate" in self.running else self.running[-1]
            self.seconds[name] += now - self.since
        self.since = now

    def count(self, tokens):
        """Counts tokens that a model passes forward, under the name of the innermost clock.

        Those of an evaluation are no step's, whatever clock runs within it.
        """
        if self.running and "evaluate" not in self.running:
            self.tokens[self.running[-1]] += tokens

    def passed(self) -> Counter:
        """Returns the tokens by name since the last call, those of this process."""
        tokens, self.tokens = self.tokens, Counter()
        return tokens

    def read(self) -> dict:
        """Returns the seconds by name since the last reading."""
        seconds = dict(self.seconds)
        self.seconds = Counter()
        return seconds


clock = Clock()
