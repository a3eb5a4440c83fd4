"""Procedural Memory Distillation itself (arXiv 2607.01480): see class PMD of ../pmd.py."""

from pmd import PMD as Method  # noqa: F401
