"""The stages of the pipeline: one module a stage, one function of that name."""
