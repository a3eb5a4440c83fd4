"""SDPO as the study varies it: see variants.py."""

from methods import sdpo
from study.variants import Variant


class Method(Variant, sdpo.Method):
    pass
