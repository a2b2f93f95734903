"""Following accepted requests to their end: the feed reader, positions, disconnects, settling, SSE bytes.

Owns the rule that a client gets each token once and in order. It must not know JSON shapes of answers.
"""
