"""System programs that some tests need; apt.txt lists the packages."""

import os
import shutil

import pytest


def require_program(name: str) -> str:
    """Return the path of a program; without it skip, or fail where REQUIRE_SYSTEM=1 is set."""
    found = shutil.which(name)
    if found:
        return found
    message = f"{name} is not installed; apt-get install the packages of apt.txt"
    if os.environ.get("REQUIRE_SYSTEM") == "1":
        pytest.fail(message)
    pytest.skip(message)
