"""Packages that only some strategies need."""

import importlib
from typing import Any

from taskvec.errors import MissingDependency


def package(name: str, strategy: str) -> Any:
    """Return an imported package.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingDependency(
            f"the strategy {strategy} needs the package {name}, which is not installed; "
            f"pip install {name}, or choose another strategy"
        ) from None
