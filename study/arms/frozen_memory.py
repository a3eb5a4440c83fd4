"""A frozen memory, as the study runs it: see ../variants.py."""

from methods import frozen_memory
from study.variants import watched

Method = watched(frozen_memory.Method)
