"""Copy docs/results/default.md into the README, between its two markers."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def with_results(readme: str, results: str) -> str:
    """Return the README with the results between the markers."""
    head, found, rest = readme.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"the README must hold {BEGIN} and {END}")
    body = "\n".join(line for line in results.splitlines() if not line.startswith("<!--"))
    # Headings one level deeper: they stand inside a section of the README.
    body = body.replace("\n#", "\n##").strip()
    return f"{head}{BEGIN}\n{body}\n{END}{tail}"


def main() -> int:
    """Rewrite the README; return the exit code."""
    readme = ROOT / "README.md"
    results = (ROOT / "docs/results/default.md").read_text()
    readme.write_text(with_results(readme.read_text(), results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
