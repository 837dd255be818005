"""Data adapters, one a module, found by its name; `items` explains the interface."""
