"""Prompts to ids and ids to text. Needs no torch; `tokenizers` is imported on first use."""
