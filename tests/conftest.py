"""A tiny policy (the embedded checkpoint), a memory with a scripted model, and a hand-made
embedder.
"""

import dataclasses
import functools
import os
import re
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the tests themselves share the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers: no test waits for a network
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # before anything imports datasets

from transformers import AutoTokenizer

import pmd
from memory import Memory
from nano.grounded import GroundedMemory
from runtime.methods import method_class
from runtime.model import load_policy

NANO = Path(__file__).resolve().parent.parent / "nano"


@dataclasses.dataclass
class Question:
    id: str
    prompt: str


@dataclasses.dataclass
class Attempt:
    """What memory.record needs of a rollout."""

    id: str
    problem: Question
    text: str
    reward: float = 0.0
    feedback: str = ""


def letters(texts):
    """An embedder to check by hand: the share of each letter, as a unit vector."""
    table = np.array(
        [[t.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for t in texts], np.float32
    )
    table[:, 0] += 1e-3  # no zero vectors
    return table / np.linalg.norm(table, axis=1, keepdims=True)


def words(texts):
    """Another: one dimension for each word (a stable hash into 4096)."""
    table = np.zeros((len(texts), 4096), np.float32)
    for row, text in zip(table, texts, strict=True):
        for word in re.findall(r"\w+", text):
            row[int.from_bytes(word.encode(), "little") % 4093] += 1
    table[:, 4095] = 1e-3
    return table / np.linalg.norm(table, axis=1, keepdims=True)


class Here:
    """A pool of processes that is this process."""

    @staticmethod
    def submit(function, *args):
        return types.SimpleNamespace(result=lambda: function(*args))


class Script:
    """A model that answers by rule and remembers what it was asked."""

    def __init__(self, rule=lambda prompt: ""):
        self.rule, self.prompts = rule, []

    def __call__(self, prompts):
        self.prompts += prompts
        return [self.rule(p) for p in prompts]


def method_of(cfg, policy=None, teacher=None, memory=None, tokenizer=None, task=None):
    """The method of cfg with these parts, without a teacher of its own making."""
    kind = method_class(cfg.method)
    method = kind.__new__(kind)
    method.cfg, method.task, method.tokenizer, method.memory = cfg, task, tokenizer, memory
    method.policy, method.teacher, method.sampler = policy, teacher, None
    return method


@pytest.fixture
def make_memory(tmp_path):
    made = []

    def make(rule=lambda prompt: "", embed=words, ground_insights=False, **knobs):
        memory = (GroundedMemory if ground_insights else Memory)(
            tmp_path / f"{len(made)}.db", embed, Script(rule), **knobs
        )
        made.append(memory)
        return memory

    yield make
    for memory in made:
        memory.db.close()


def small_config(folder, *flags, **changes):
    """The nano preset, cut down to seconds, for runs under `folder`."""
    small = dict(
        steps=2,
        batch_size=3,
        mini_batch_size=3,
        group_size=4,
        eval_problems=3,
        eval_k=2,
        eval_every=0,
        save_every=0,
        log_every=1,
        out=str(folder),
    )
    # whose flags are its own
    method = ["--method", changes["method"]] if "method" in changes else []
    return dataclasses.replace(pmd.parse_flags([*flags, *method]), **(small | changes))


@pytest.fixture
def make_config(tmp_path):
    return functools.partial(small_config, tmp_path)


@pytest.fixture
def policy(make_config):
    return load_policy(make_config())


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO)
