"""Procedural Memory Distillation itself (arXiv 2607.01480): see class PMD of ../pmd.py.

Teacher reads: the memory: strategies, lessons, behaviors, a success, feedback.
Loss: a generalized JSD (Eq. 7 and Table 11).
Claims more than: sdpo.
"""

from pmd import PMD as Method  # noqa: F401
