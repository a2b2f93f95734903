"""Room of the capacity planner; nothing is in it yet.

It will simulate with the very schedulers that run in production (`engines.scheduler`, pure, time passed in) and may see
nothing else but `configs`; `lint-imports` holds that from the first line on.
"""
