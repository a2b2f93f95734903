"""The choice in C++ is the choice of torch: any filters, ties, rows without a token left, slots and threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.sampling.chooser import TorchChooser
from engines.sampling.native import NativeChooser
from engines.sampling.peaks import GroupMaxima

NATIVE, TORCH = NativeChooser(), TorchChooser()
NO_FILTER = (1.0, 0.0, 1.0, 0.0)  # temperature, top_k, top_p, min_p


def random_columns(num_rows: int, seed: int, **fixed: float) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    options = {
        "temperature": [1e-5, 0.01, 0.3, 0.7, 0.7, 1.0, 1.0, 2.0, 100.0],
        "top_k": [0, 0, 0, 1, 5, 20, 63, 64, 65, 230, 1_000_000],
        "top_p": [1.0, 1.0, 0.999, 0.95, 0.8, 0.5, 0.01],
        "min_p": [0.0, 0.0, 0.001, 0.05, 0.3, 1.0],
    }
    columns = [
        np.full(num_rows, fixed[name]) if name in fixed else rng.choice(values, num_rows)
        for name, values in options.items()
    ]
    return np.ascontiguousarray(np.stack([*columns, rng.random(num_rows)]).astype(np.float64))


def random_logits(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    """Rows of every kind: flat, peaked, with many ties, with tokens that are forbidden."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.05, 0.5, 2.0, 6.0])[torch.arange(num_rows) % 4]
    logits = torch.randn(num_rows, vocab_size, generator=generator) * spread[:, None]
    logits[1::3] = logits[1::3].bfloat16().float()
    logits[::5][torch.rand(logits[::5].shape, generator=generator) < 0.4] = -torch.inf
    return logits


def both(logits: Tensor, columns: NDArray[np.float64]) -> tuple[list[int], list[int]]:
    rows = list(range(len(logits)))
    return NATIVE.choose(logits, rows, columns), TORCH.choose(logits, rows, columns)


def in_a_row(*uniforms: float, filters: tuple[float, ...] = NO_FILTER) -> NDArray[np.float64]:
    return np.array([[*filters, uniform] for uniform in uniforms]).T.copy()


def test_a_hundred_thousand_choices_are_those_of_torch() -> None:
    for seed in range(20):
        logits = random_logits(5000, 250, seed)
        native, expected = both(logits, random_columns(5000, seed))
        assert native == expected


@pytest.mark.parametrize("vocab_size", [1, 7, 63, 64, 65, 259, 2560, 5003, 50_257])
def test_any_vocabulary_gives_the_choices_of_torch(vocab_size: int) -> None:
    num_rows = 400 if vocab_size < 10_000 else 60
    native, expected = both(random_logits(num_rows, vocab_size, 3), random_columns(num_rows, 3))
    assert native == expected


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 4000.0}, {"min_p": 1e-4}])
def test_flat_rows_whose_choice_lies_deep_give_those_of_torch(filters: dict[str, float]) -> None:
    fixed = {"temperature": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0} | filters
    logits = torch.randn(60, 20_000, generator=torch.Generator().manual_seed(5)) * 0.3
    native, expected = both(logits, random_columns(60, 5, **fixed))
    assert native == expected
    assert max(native) > 1000


@pytest.mark.parametrize("vocab_size", [4, 100, 8192])
def test_equal_logits_share_the_probability_exactly(vocab_size: int) -> None:
    logits = torch.full((1, vocab_size), 3.3)
    half = vocab_size // 2
    just_below = np.nextafter(0.5, 0.0)
    for columns, expected in (
        (in_a_row(0.5), half),
        (in_a_row(just_below), half - 1),
        (in_a_row(0.0), 0),
        (in_a_row(1 - 2.0**-53), vocab_size - 1),
        (in_a_row(1 - 2.0**-53, filters=(0.7, 0.0, 0.5, 0.0)), half - 1),
        (in_a_row(1 - 2.0**-53, filters=(0.7, half, 0.5, 0.0)), half // 2 - 1),
        (in_a_row(1 - 2.0**-53, filters=(0.7, 0.0, 1.0, 1.0)), vocab_size - 1),
    ):
        assert both(logits, columns) == ([expected], [expected])


def test_a_token_without_probability_is_never_chosen() -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, [40, 200]] = torch.tensor([1.0, 1.0])
    logits[0, 7] = -1e6
    for uniform, expected in ((0.0, 40), (0.5, 200), (1 - 2.0**-53, 200)):
        assert both(logits, in_a_row(uniform)) == ([expected], [expected])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_rows_of_nothing_but_infinities_give_the_first_of_the_largest(value: float) -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, [90, 250]] = value
    expected = 90 if value > 0 else 0
    assert both(logits, in_a_row(0.7)) == ([expected], [expected])


def test_a_row_gets_the_same_token_in_any_slot_and_with_any_number_of_threads() -> None:
    logits, columns = random_logits(64, 3000, 9), random_columns(64, 9)
    rows = list(range(64))
    alone = [NATIVE.choose(logits, [i], np.ascontiguousarray(columns[:, [i]]))[0] for i in rows]
    backwards = NATIVE.choose(logits, rows[::-1], np.ascontiguousarray(columns[:, ::-1]))
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert NATIVE.choose(logits, rows, columns) == alone == backwards[::-1]
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("vocab_size", [1, 40, 259, 2560, 50_257])
@pytest.mark.parametrize("group", [8, 32])
def test_maxima_that_are_known_change_no_choice(vocab_size: int, group: int) -> None:
    num_rows, num_groups = 60, -(-vocab_size // group)
    logits, columns = random_logits(num_rows, vocab_size, 6), random_columns(num_rows, 6)
    padded = torch.nn.functional.pad(logits, (0, num_groups * group - vocab_size), value=-torch.inf)
    values = torch.full((num_rows, num_groups + 3), torch.nan)
    values[:, :num_groups] = padded.view(num_rows, num_groups, group).amax(-1)
    rows = list(range(num_rows))[::-2]
    chosen = NATIVE.choose(logits, rows, columns[:, rows].copy(), GroupMaxima(values.numpy(), group))
    assert chosen == NATIVE.choose(logits, rows, columns[:, rows].copy())


@pytest.mark.parametrize(("vocab_size", "num_top"), [(3, 20), (259, 0), (259, 5), (5003, 20), (5003, 400)])
def test_scores_are_the_logprobs_of_the_model_in_order(vocab_size: int, num_top: int) -> None:
    logits = random_logits(30, vocab_size, 2)
    logits[::5] = logits[1]  # no forbidden ones: -inf is no number to be close to
    chosen = [i % vocab_size for i in range(30)]
    ids, logprobs = NATIVE.score(logits, list(range(30)), chosen, num_top)

    expected = logits.double().log_softmax(-1)
    best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    assert ids == best.tolist()
    wanted = torch.cat((expected.gather(1, best), expected[range(30), chosen][:, None]), dim=1)
    torch.testing.assert_close(torch.tensor(logprobs).double(), wanted, rtol=1e-6, atol=1e-5)


def test_scores_of_chosen_rows_are_those_of_torch() -> None:
    logits = random_logits(12, 700, 8)
    native, expected = (each.score(logits, [3, 8, 1], [5, 6, 7], 4) for each in (NATIVE, TORCH))
    assert native[0] == expected[0]
    torch.testing.assert_close(torch.tensor(native[1]), torch.tensor(expected[1]), rtol=1e-5, atol=1e-5)
