"""What each study shows: one module a study, one function of its name, and what they share."""
