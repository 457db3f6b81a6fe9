"""Compare two dumps of named activations and name the first that leaves its limit."""
