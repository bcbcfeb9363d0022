"""The laws, one question per file."""
