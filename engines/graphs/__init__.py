"""Decode steps as graphs: the kernels of a forward pass recorded once and launched again as one.

Owns which steps are replayed, the fixed memory that a recorded pass reads its step from, and the check that a graph
computes what the eager pass computes. Must not know schedulers or sampling. The modules import torch and are therefore
imported by name.
"""
