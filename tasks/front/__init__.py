"""The output thread of a worker: between the engine process and the state server.

Owns every request that this worker has claimed or was handed: its owner token, its text, what is published of it, and
when the engine must drop it. It calls `StateStore` and speaks `engines.messages`. It must not call Celery or kombu
(it posts to the hub through `HubPort`), and imports no torch.
"""

from tasks.front.loop import Front
from tasks.front.ports import HubPort, JobPort

__all__ = ["Front", "HubPort", "JobPort"]
