"""Structured outputs: what a text must look like, and which tokens may come next because of it.

Owns the constraint that travels with a request, the guards that refuse it before anything is compiled, the child
process that checks it for the gateway, and the grammar states of the engine. Only the engine's sampler turns masks into
tensors; here is no torch. llguidance is imported only where something is compiled.
"""

from engines.structured.constraint import Constraint, choice_grammar
from engines.structured.errors import BadConstraint, CheckerBusy
from engines.structured.schema_guard import check_schema

__all__ = ["BadConstraint", "CheckerBusy", "Constraint", "check_schema", "choice_grammar"]
