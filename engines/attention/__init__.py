"""Attention over paged KV, behind one Protocol.

Owns how keys and values get into blocks and how queries read them. Must not know models, sequences or schedulers: it
sees one step as lengths, positions and block tables (`AttentionMetadata`). The torch backend is always there and always
right; faster ones are measured against it. The modules import torch and are therefore imported by name.
"""
