"""The paper's grid: every combination of the coefficients' values (arXiv:2212.04089, section 2)."""

from taskvec.search import Problem, combinations


def grid(problem: Problem) -> None:
    """Evaluate all points of the ranges, and all options, on all validation items."""
    for choice in problem.choices:
        for coefficients in combinations(problem.ranges):
            problem.evaluate(coefficients, choice)
