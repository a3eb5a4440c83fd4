"""SDPO, as the study runs it: see ../variants.py."""

from methods import sdpo
from study.variants import watched

Method = watched(sdpo.Method)
