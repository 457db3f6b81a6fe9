"""How dsv4-nano was made: data, tokenizer, training and export. Not part of the package."""
