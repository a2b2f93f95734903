"""Disaggregated output equals monolithic output, over many prompts and every way that KV can take."""
