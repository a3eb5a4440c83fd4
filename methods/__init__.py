"""One file a method: what it changes in the phases of pmd.py. `--method NAME` takes
methods/NAME.py.
"""
