"""Neurons -> experts; one method a file, `split_ffn.py` puts them in order."""
