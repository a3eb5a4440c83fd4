"""PMD, as the study runs it: see ../variants.py."""

from methods import pmd
from study.variants import watched

Method = watched(pmd.Method)
