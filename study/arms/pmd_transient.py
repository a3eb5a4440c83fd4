"""PMD with a transient memory, as the study runs it: see ../variants.py."""

from methods import pmd_transient
from study.variants import watched

Method = watched(pmd_transient.Method)
