"""The toy models of the tests, by kind: no test file has one of its own, but for what makes sense in one test alone."""
