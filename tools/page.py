"""Writes a page: one HTML file that holds its data, style and script, and opens without a server.

Templates are in pages/. Data enter as JSON in which jinja2 escapes what HTML reads, and the
scripts put every text into the page as text. A policy in the page's head lets no other script run
and nothing be loaded. So a text that a model wrote stays a text.
"""

import json
import math
import secrets
from pathlib import Path

import jinja2

from runtime.files import write

PAGES = Path(__file__).resolve().parent / "pages"


def dumps(value, **options) -> str:
    """Writes JSON that a browser reads: NaN and infinities, which it has not, become null."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **options)


def finite(value):
    """Puts None in the place of the numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_page(path, template, **values) -> Path:
    """Renders a template of pages/ into the file `path`; returns it.

    values: what the template names. `{{ value | tojson }}` embeds data.
    """
    loader = jinja2.FileSystemLoader(PAGES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_function"] = dumps
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    nonce = secrets.token_urlsafe()  # of this page's scripts; no other may run
    text = environment.get_template(template).render(nonce=nonce, **values)
    write(Path(path), text, "make its folder, with some space, writable for you")
    return Path(path)
