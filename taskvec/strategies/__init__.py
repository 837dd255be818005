"""Ways to find coefficients, a module each, found by its name; `taskvec.search` says how."""
