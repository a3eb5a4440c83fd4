"""GRPO, as the study runs it: see ../variants.py."""

from methods import grpo
from study.variants import watched

Method = watched(grpo.Method)
