"""Writes into the KV cache and dense reads of it."""
