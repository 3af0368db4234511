"""Coverage-guided fuzzing; runs by hand, not as part of the tests."""
