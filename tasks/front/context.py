"""What the parts of the output thread share. One object, owned by that thread."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from configs.schema import Settings
from engines.messages import Ready, Stats
from engines.tokenizer import Tokenizer
from kvstore.clock import Clock
from kvstore.state.server_clock import ServerClock
from tasks.front.calls import RepeatedCalls
from tasks.front.link import EngineLink
from tasks.front.ports import HubPort
from tasks.front.requests import LiveRequest
from tasks.front.timers import Timers
from tasks.names import Identity
from tasks.options import WorkerOptions

if TYPE_CHECKING:
    from kvstore.state.store import StateStore

RECENT_S = 60.0
MAX_RECENT = 4096


class RecentEnds:
    """How requests ended here lately: their Celery message may come after them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ends: OrderedDict[str, tuple[float, float, str]] = OrderedDict()

    def add(self, rid: str, started_s: float, outcome: str) -> None:
        now = self._clock()
        self._ends[rid] = (now, started_s, outcome)
        self._ends.move_to_end(rid)
        while self._ends:
            oldest = next(iter(self._ends))
            if len(self._ends) <= MAX_RECENT and now - self._ends[oldest][0] <= RECENT_S:
                break
            del self._ends[oldest]

    def get(self, rid: str) -> tuple[float, str] | None:
        """(started_s, outcome), or None if it is not known."""
        end = self._ends.get(rid)
        return None if end is None else end[1:]


@dataclass
class FrontContext:
    """The world as the output thread sees it.

    Attributes:
        ready: the engine that is up, None while there is none.
        live: requests that this worker owns, by request id.
        dirty: those with something to publish.
        num_slots: what `pool_grow` and `pool_shrink` set.
    """

    settings: Settings
    options: WorkerOptions
    identity: Identity
    store: StateStore
    tokenizer: Tokenizer
    hub: HubPort
    clock: Clock
    num_slots: int
    link: EngineLink
    timers: Timers
    calls: RepeatedCalls
    recent: RecentEnds
    live: dict[str, LiveRequest] = field(default_factory=dict)
    dirty: set[LiveRequest] = field(default_factory=set)
    ready: Ready | None = None
    stats: Stats | None = None
    server_clock: ServerClock = field(default_factory=ServerClock)
    is_draining: bool = False

    @property
    def model(self) -> str:
        return self.settings.model.name
