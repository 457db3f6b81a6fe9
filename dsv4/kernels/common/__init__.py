"""Device helpers that kernel families share."""
