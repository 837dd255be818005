"""Task vectors: extract, combine, apply, search and evaluate edits of model weights.

The library knows no orchestrator: `from taskvec.vectors import TaskVector` works in a notebook.
"""
