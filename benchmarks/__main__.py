"""`python -m benchmarks [SECTION] [--quick]`: measure, write docs/benchmarks.md.

Sections are pipeline, cluster, lineage, search, strategies and merging. Naming one measures and
replaces only that. ``--quick`` is a smoke test: it measures too little to mean anything, prints the
sections and writes nothing.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT
from taskvec.atomic import write_text

SECTIONS = ("pipeline", "cluster", "lineage", "search", "strategies", "merging")
PAGE = ROOT / "docs/benchmarks.md"
MARK = "<!-- {} -->"
HEAD = """# Benchmarks

Written by `python -m benchmarks`; do not edit. Absolute times say the order of magnitude on one
small machine; the quotients, measured side by side, are the result. A missed target says so.
"""


def main() -> None:
    """Measure the sections that the arguments name, all of them by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("section", nargs="?", choices=SECTIONS)
    parser.add_argument("--quick", action="store_true", help="smoke test; writes nothing")
    merging = parser.add_argument_group("merging")
    merging.add_argument(
        "--scratch",
        type=Path,
        help="directory for generated checkpoints, on a disk; default: TMPDIR",
    )
    merging.add_argument(
        "--mergekit-venv", type=Path, help="environment with mergekit; default: a new one, by pip"
    )
    arguments = parser.parse_args()
    options: dict[str, dict[str, Any]] = {
        "merging": {"scratch": arguments.scratch, "mergekit_venv": arguments.mergekit_venv}
    }
    sections = read(PAGE.read_text() if PAGE.is_file() else "")
    for name in [arguments.section] if arguments.section else SECTIONS:
        module = importlib.import_module(f"benchmarks.{name}")
        text = module.measure(quick=arguments.quick, **options.get(name, {}))
        print(f"{text}\n")
        sections[name] = text
        if not arguments.quick:
            write_text(PAGE, page(sections))


def read(text: str) -> dict[str, str]:
    """Return the sections of a page that `page` wrote."""
    sections = {}
    for name in SECTIONS:
        _, found, rest = text.partition(f"{MARK.format(name)}\n")
        if found:
            sections[name] = rest.partition("<!-- ")[0].strip()
    return sections


def page(sections: dict[str, str]) -> str:
    """Return the page with the sections that there are, each after a mark with its name."""
    known = [name for name in SECTIONS if name in sections]
    return "\n".join([HEAD, *(f"{MARK.format(name)}\n{sections[name]}\n" for name in known)])


if __name__ == "__main__":
    main()
