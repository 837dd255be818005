"""What the other tests of a module let pass, found by changing the code; see docs/mutation.md."""
