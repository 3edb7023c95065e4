"""What pages share: where their templates lie, and how figures and anchors get into them."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from adaskip.reports.figures import as_data_uri


def page_environment() -> Environment:
    """Templates of this folder, escaped, in which nothing may be missing."""
    environment = Environment(
        loader=PackageLoader("adaskip.reports", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["anchor"] = anchor
    environment.filters["data_uri"] = as_data_uri
    return environment


def anchor(name: str) -> str:
    """A name as the address of a section."""
    return "".join(char if char.isalnum() else "-" for char in name.lower())
