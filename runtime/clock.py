"""Where the seconds of a step go."""

import contextlib
import time
from collections import Counter

import torch


class Clock:
    """Seconds by name, each second counted once: what runs inside stops the clock of what is around
    it.
    """

    def __init__(self):
        self.seconds, self.running, self.peak = Counter(), [], 0

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
            free, total = (
                torch.cuda.mem_get_info()
            )  # torch's own count would hold what a sleeping vLLM has given back
            self.peak = max(
                self.peak, total - free
            )  # where phases end, when torch still keeps what it took in them
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def read(self) -> dict:
        """The seconds since the last reading."""
        found, self.seconds = dict(self.seconds), Counter()
        return found


clock = Clock()
