"""The command `celeriac`, and how the processes of a cluster are started, watched and ended.

Owns the command line, the supervisor behind `up`, the run folder, `doctor`. A supervisor only: every process it starts
can be started by hand. It must not know what a request is; it reads the registry and reports proven deaths. Never
imports torch.
"""

from __future__ import annotations

__all__: list[str] = []
