"""Model families, one a module, found by its name; `open_clip` explains the interface."""
