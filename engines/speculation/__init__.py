"""Speculation: guesses of the next tokens of a sequence, which one forward pass verifies all at once.

Owns what is guessed (`ngram_index`), how much of it (`acceptance`), both together per sequence (`proposer`), and what
is kept (`verify`). Pure: no torch, no clock, no I/O. Must not know blocks or batches: the scheduler decides what of a
guess fits into a step.
"""
