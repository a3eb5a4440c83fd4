"""What a run needs and no paper mentions.

Our kernels.py has the name of Hugging Face's package `kernels`, which TRL brings. Where that is
installed, transformers would look into our file for it. So transformers is told here, before any
room imports it, that the package is not there. Nothing of ours uses it.
"""

import importlib.metadata


def hide_hub_kernels():
    """Tells transformers that Hugging Face's `kernels` is not there, if it is installed."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    from transformers import utils  # a second to import, and only where there is a need
    from transformers.utils import import_utils

    for module in (utils, import_utils):
        module.is_kernels_available = lambda *bounds: False


hide_hub_kernels()
