"""Linear layers behind one Protocol: which library multiplies, and how it wants the weights to lie.

Owns packing and the choice, made once per engine. Must not know models: it sees one weight and one bias at a time. The
modules import torch and are therefore imported by name.
"""
