"""Published ways to merge task vectors, one method a module, found by its name."""
