"""Who gives blocks up when they run out, and what becomes of it, in virtual time.

`World` keeps what lies in every block and page, as the region and the host store would: a step that reads KV that is
not its own sequence's fails.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.params import SamplingParams
from engines.scheduler import DecodeScheduler, StepPlan
from engines.sequence import Sequence
from engines.swap import MAX_PREEMPTIONS, BlockCopy, Ladder, SwapCosts, SwappedRequests
from kvstore.blocks import BlockPool, OutOfBlocks

BLOCK_SIZE = 4
Content = tuple[str, int, int]  # request, choice (-1: its prompt), position


class World:
    """A decode scheduler, its pools, and their content."""

    def __init__(self, num_blocks: int, num_pages: int, *, has_peers: bool = False, **limits: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.pages = BlockPool(num_pages) if num_pages else None
        self.ladder = Ladder(SwappedRequests(self.pool, BLOCK_SIZE, self.pages))
        self.ladder.has_peers = has_peers
        self.scheduler = DecodeScheduler(self.pool, None, BLOCK_SIZE, ladder=self.ladder, **limits)
        self.blocks: dict[int, list[Content | None]] = {i: [None] * BLOCK_SIZE for i in range(num_blocks)}
        self.host: dict[int, list[Content | None]] = {}
        self.left: list[Sequence] = []
        self.moving: list[Sequence] = []
        self.kinds: Counter[str] = Counter()
        self._step_s = 0.0

    def arrive(self, rid: str, num_tokens: int, *, arrival_s: float = 0.0, num_choices: int = 1) -> list[Sequence]:
        """A request that came with the KV of its prompt; its choices share the full blocks of it."""
        choices = []
        num_full = (num_tokens - 1) // BLOCK_SIZE
        shared: list[int] = []
        for choice in range(num_choices):
            sequence = Sequence(
                rid, choice, list(range(num_tokens)), SamplingParams(max_tokens=500), 0, arrival_s=arrival_s
            )
            if shared:
                self.pool.share(shared)
            else:
                shared = self.pool.allocate(num_full)
            sequence.block_table = shared + self.pool.allocate(-(-num_tokens // BLOCK_SIZE) - num_full)
            sequence.num_computed_tokens, sequence.output_token_ids = num_tokens, [1]
            sequence.owner = (3, "t")
            for position in range(num_tokens):
                self._write(sequence, position)
            self.scheduler.add(sequence)
            choices.append(sequence)
        return choices

    def step(self) -> StepPlan | None:
        self._step_s += 1.0
        plan = self.scheduler.schedule(self._step_s)
        if plan is None:
            return None
        for copy in plan.swapped_out:
            self.host.update({page: list(self.blocks[block]) for block, page in copy.pairs})
        for copy in plan.swapped_in:
            self.blocks.update({block: list(self.host[page]) for block, page in copy.pairs})
        self.left += plan.preempted
        self.moving += plan.moved
        for item in plan.scheduled:
            sequence = item.sequence
            for position in range(item.start):
                found = self.blocks[sequence.block_table[position // BLOCK_SIZE]][position % BLOCK_SIZE]
                assert found == self._content(sequence, position)
            for position in range(item.start, item.start + item.num_new_tokens):
                self._write(sequence, position)
        self.scheduler.complete(plan, {item.sequence.seq_id: [7] for item in plan.scheduled if item.samples})
        self.kinds["swap"] += len(plan.swapped_out)
        self.kinds["move"] += len(plan.moved)
        self.kinds["release"] += len({sequence.rid for sequence in plan.preempted})
        self.kinds["back"] += len(plan.swapped_in)
        return plan

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence.seq_id)
        self.pool.free(sequence.block_table)
        sequence.block_table = []

    def settle_move(self) -> Sequence:
        """The oldest move has an end: its blocks are back."""
        sequence = self.moving.pop(0)
        self.ladder.moving.discard(sequence.rid)
        self.end(sequence)
        return sequence

    def _write(self, sequence: Sequence, position: int) -> None:
        block = sequence.block_table[position // BLOCK_SIZE]
        self.blocks[block][position % BLOCK_SIZE] = self._content(sequence, position)

    @staticmethod
    def _content(sequence: Sequence, position: int) -> Content:
        is_prompt = position < len(sequence.prompt_token_ids)
        return (sequence.rid, -1 if is_prompt else sequence.choice, position)


def two_in(world: World) -> tuple[Sequence, Sequence]:
    """An early and a late sequence that fill a pool of four blocks; the early one needs a fifth."""
    (early,), (late,) = world.arrive("early", 8), world.arrive("late", 7, arrival_s=1.0)
    return early, late


def test_a_preempted_sequence_goes_to_host_memory_first() -> None:
    world = World(4, 8, has_peers=True)
    early, late = two_in(world)

    plan = world.step()

    assert plan is not None
    assert [copy.rid for copy in plan.swapped_out] == ["late"]
    assert (plan.moved, plan.preempted) == ((), ())
    assert [item.sequence for item in plan.scheduled] == [early]
    assert (late.block_table, late.num_computed_tokens, late.num_preemptions) == ([], 7, 1)
    assert world.scheduler.num_waiting == 1


def test_a_swapped_sequence_goes_on_where_it_stood_once_blocks_are_free() -> None:
    world = World(4, 8)
    early, late = two_in(world)
    for _ in range(4):
        world.step()
    world.end(early)

    plan = world.step()

    assert plan is not None
    assert [copy.rid for copy in plan.swapped_in] == ["late"]
    assert [(item.sequence, item.start, item.num_new_tokens) for item in plan.scheduled] == [(late, 7, 1)]
    assert world.pages is not None
    assert world.pages.num_used == 0


def test_a_swapped_sequence_comes_back_before_anybody_who_waits() -> None:
    world = World(4, 8)
    early, late = two_in(world)
    world.step()
    newcomer = Sequence("new", 0, [1, 2], SamplingParams(), 0, priority=-5)
    world.scheduler.add(newcomer)
    for _ in range(3):
        world.step()
    assert newcomer.block_table == []  # one block is free, which would be enough for it

    world.end(early)
    plan = world.step()

    assert plan is not None
    assert [item.sequence for item in plan.scheduled] == [late, newcomer]


def test_choices_are_swapped_together_and_share_their_blocks_again_afterwards() -> None:
    world = World(8, 8)
    choices = world.arrive("late", 7, arrival_s=1.0, num_choices=2)  # one shared block, one each
    world.arrive("early", 16)
    world.arrive("other", 1)

    plan = world.step()
    assert plan is not None
    assert [copy.rid for copy in plan.swapped_out] == ["late"]
    assert len(plan.swapped_out[0].pairs) == 3
    for sequence in list(world.scheduler._running):
        world.end(sequence)
    assert world.step() is not None

    assert choices[0].block_table[0] == choices[1].block_table[0]
    assert world.pool.ref_count(choices[0].block_table[0]) == 2
    assert world.pool.num_used == 3


def test_a_choice_that_ends_while_it_lies_in_host_memory_frees_its_own_pages() -> None:
    world = World(8, 8)
    choices = world.arrive("late", 7, arrival_s=1.0, num_choices=2)
    world.arrive("early", 16)
    world.arrive("other", 1)
    world.step()
    assert world.pages is not None
    assert world.pages.num_used == 3

    world.scheduler.remove(choices[0].seq_id)
    assert world.pages.num_used == 2
    world.scheduler.remove(choices[1].seq_id)
    assert world.pages.num_used == 0


def test_a_full_host_store_leaves_the_move_to_another_worker() -> None:
    world = World(4, 1, has_peers=True)
    _, late = two_in(world)

    plan = world.step()

    assert plan is not None
    assert plan.moved == (late,)
    assert len(late.block_table) == 2  # its KV is still to be sent
    assert plan.swapped_out == plan.preempted == ()


def test_while_one_moves_nobody_else_is_taken_and_the_worker_does_not_spin() -> None:
    world = World(4, 0, has_peers=True)
    two_in(world)
    world.step()

    assert world.step() is None
    assert world.scheduler.next_wakeup_s(9.0) is None
    world.settle_move()
    plan = world.step()
    assert plan is not None
    assert [item.sequence.rid for item in plan.scheduled] == ["early"]
    assert world.kinds == {"move": 1, "swap": 0, "release": 0, "back": 0}


@pytest.mark.parametrize("case", ["no peers", "pinned", "not owned", "two choices"])
def test_what_cannot_move_is_released(case: str) -> None:
    world = World(6 if case == "two choices" else 4, 0, has_peers=case != "no peers")
    (early,) = world.arrive("early", 8)
    late = world.arrive("late", 7, arrival_s=1.0, num_choices=2 if case == "two choices" else 1)
    if case == "two choices":
        world.arrive("filler", 1)
    if case == "pinned":
        late[0].num_preemptions = early.num_preemptions = MAX_PREEMPTIONS
        late[0].output_token_ids = [1, 1]  # it needs a block, too: only one of them can get it
        late[0].num_computed_tokens = 8
    if case == "not owned":
        late[0].owner = None

    plan = world.step()

    assert plan is not None
    assert set(plan.preempted) == set(late)
    assert plan.moved == ()


def test_swapping_is_skipped_where_computing_again_is_cheaper() -> None:
    costs = SwapCosts(copy_s_per_block=1.0)
    costs.stepped(num_tokens=100, elapsed_s=1.0)

    assert not costs.is_swap_cheaper(num_blocks=2, num_tokens=8)
    assert costs.is_swap_cheaper(num_blocks=2, num_tokens=1000)
    costs.copied(num_blocks=1000, elapsed_s=0.0)
    assert costs.copy_s_per_block == pytest.approx(0.8)


def test_more_pages_than_there_are_take_nothing() -> None:
    pool = BlockPool(4)
    swapped = SwappedRequests(pool, BLOCK_SIZE, BlockPool(1))
    sequence = Sequence("r", 0, list(range(8)), SamplingParams(), 0, num_computed_tokens=8)
    sequence.block_table = pool.allocate(2)

    with pytest.raises(OutOfBlocks):
        swapped.take([sequence])

    assert len(sequence.block_table) == pool.num_used == 2


def test_reserved_blocks_hold_nothing_and_are_not_copied() -> None:
    pool = BlockPool(8)
    swapped = SwappedRequests(pool, BLOCK_SIZE, BlockPool(8))
    sequence = Sequence("r", 0, list(range(5)), SamplingParams(), 0, num_computed_tokens=5)
    sequence.block_table = pool.allocate(6)

    copy = swapped.take([sequence])
    assert (len(copy.pairs), swapped.num_blocks, pool.num_used) == (2, 6, 0)
    sequences, back = swapped.bring_back("r")

    assert isinstance(back, BlockCopy)
    assert sequences == [sequence]
    assert (len(sequence.block_table), len(back.pairs), swapped.num_used_pages) == (6, 2, 0)


request_lists = st.lists(
    st.tuples(
        st.integers(1, 24),  # prompt tokens
        st.integers(1, 40),  # output tokens
        st.sampled_from([1, 1, 1, 2, 3]),  # choices
        st.integers(0, 12),  # steps before it comes
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=60, deadline=None)
@given(
    requests=request_lists,
    num_pages=st.integers(0, 30),
    has_peers=st.booleans(),
    watermark=st.integers(0, 2),
    max_num_seqs=st.integers(3, 8),
    answers=st.randoms(use_true_random=False),
)
def test_every_sequence_ends_with_its_own_kv_whatever_the_mix(
    requests: list[tuple[int, int, int, int]],
    num_pages: int,
    has_peers: bool,
    watermark: int,
    max_num_seqs: int,
    answers: st.DataObject,
) -> None:
    """Sixteen blocks hold any single sequence. Whoever leaves comes back as from the queue, pinned and with all it can
    need; one that moves comes back from the other worker with its count."""
    world = World(16, num_pages, has_peers=has_peers, watermark_blocks=watermark, max_num_seqs=max_num_seqs)
    coming = sorted(
        (arrival, i, num_prompt, num_output, num_choices)
        for i, (num_prompt, num_output, num_choices, arrival) in enumerate(requests)
    )
    back_with: list[tuple[Sequence, bool]] = []
    live: list[Sequence] = []
    wanted = {f"r{i}": prompt + output for i, (prompt, output, _, _) in enumerate(requests)}
    num_to_end = sum(num_choices for _, _, num_choices, _ in requests)

    for now in range(4000):
        if not num_to_end:
            break
        while coming and coming[0][0] <= now:
            _, i, num_prompt, _, num_choices = coming[0]
            num_blocks = -(-num_prompt // BLOCK_SIZE) + num_choices - 1
            if world.pool.num_free - world.ladder.swapped.num_blocks < num_blocks:
                break
            live += world.arrive(f"r{i}", num_prompt, arrival_s=float(i), num_choices=num_choices)
            del coming[0]
        for sequence, is_whole in list(back_with):
            num_tokens = wanted[sequence.rid] if is_whole else sequence.num_tokens + BLOCK_SIZE
            num_blocks = min(-(-num_tokens // BLOCK_SIZE), 16)
            if world.pool.num_free - world.ladder.swapped.num_blocks >= num_blocks:
                sequence.block_table = world.pool.allocate(num_blocks)
                for position in range(sequence.num_tokens - 1):
                    world._write(sequence, position)
                sequence.num_computed_tokens = sequence.num_tokens - 1
                world.scheduler.add(sequence)
                back_with.remove((sequence, is_whole))
        world.step()
        gone = {sequence.rid for sequence in world.left}
        for sequence in [one for one in live if one.rid in gone and (one, True) not in back_with]:
            world.end(sequence)  # its choices wherever they are: the front drops the whole request
            sequence.num_preemptions = MAX_PREEMPTIONS
            back_with.append((sequence, True))
        world.left.clear()
        if world.moving and answers.random() < 0.5:  # type: ignore[attr-defined]
            sequence = world.settle_move()
            assert sequence.num_preemptions <= MAX_PREEMPTIONS
            back_with.append((sequence, sequence.num_preemptions >= MAX_PREEMPTIONS))
        for sequence in [one for one in live if one.num_tokens >= wanted[one.rid] and one.block_table]:
            if sequence not in world.moving:
                world.end(sequence)
                live.remove(sequence)
                num_to_end -= 1
        world.pool.check_invariants()
        if world.pages is not None:
            world.pages.check_invariants()

    assert num_to_end == 0
    assert world.pool.num_used == 0
    assert world.ladder.swapped.num_used_pages == 0
