"""Models of Hugging Face transformers: structured ones are saved, found and loaded like any other."""
