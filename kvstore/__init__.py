"""What the cluster remembers and moves: request state in Redis, KV blocks and grants, and the transports of KV bytes.

Owns `state` (records, logs, feeds, leases), `blocks` (ids only, no tensors) and `transport` (bytes, no tensors). Must
not know models, tensors, Celery or HTTP. Imports only `configs` of this project.
"""
