"""Data: tokenizer, readers of raw documents, token stores and what is drawn from them."""
