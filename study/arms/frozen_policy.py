"""A frozen policy, as the study runs it: see ../variants.py."""

from methods import frozen_policy
from study.variants import watched

Method = watched(frozen_policy.Method)
