"""Copy the summary of docs/results/default.md into the README, between its two markers."""

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
    introduction = results.partition("# Results")[2].partition("## Summary")[0].strip()
    summary = results.partition("## Summary")[2].partition("\n## ")[0].strip()
    link = "All figures: [docs/results/default.md](docs/results/default.md)."
    body = f"{introduction}\n\n{summary}\n\n{link}"
    return f"{head}{BEGIN}\n{body}\n{END}{tail}"


def main() -> int:
    """Rewrite the README; return the exit code."""
    readme = ROOT / "README.md"
    results = (ROOT / "docs/results/default.md").read_text()
    readme.write_text(with_results(readme.read_text(), results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
