"""Measurements of a running cluster, from the outside.

Owns the load generator, the statistics and the reports behind `celeriac bench`. Speaks HTTP, and starts clusters with
the `celeriac` command like any user: it must not import the other packages, so that it measures what users get.
"""
