"""Streamed text: nothing lost, no half characters, stop strings found over any token boundary."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.params import SamplingParams
from engines.tokenizer import TextStream, Tokenizer
from engines.tokenizer.stop_strings import StopMatcher

TOKENIZER = Tokenizer.from_folder(Path(__file__).resolve().parents[3] / "models" / "tiny-chat")
EMOJI_IDS = TOKENIZER.encode("a🙂日👩‍👩‍👧é")
ANY_IDS = st.lists(
    st.one_of(st.integers(0, TOKENIZER.vocab_size - 1), st.sampled_from(EMOJI_IDS), st.sampled_from([0, 1, 2])),
    max_size=40,
)


def stream(**params: object) -> TextStream:
    return TextStream(TOKENIZER, SamplingParams(**params))  # type: ignore[arg-type]


def run(ids: list[int], **params: object) -> tuple[list[str], str, str | None]:
    """Texts per token, the rest, and the stop string."""
    text_stream = stream(**params)
    texts = [text_stream.push(token_id) for token_id in ids]
    return texts, text_stream.finish("length"), text_stream.matched_stop


# ---------------------------------------------------------------- whole characters
@settings(max_examples=300, deadline=None)
@given(ANY_IDS, st.booleans())
def test_joined_texts_are_the_decoded_ids(ids: list[int], skip: bool) -> None:
    texts, rest, _ = run(ids, ignore_eos=True, skip_special_tokens=skip)

    assert "".join(texts) + rest == TOKENIZER.decode(ids, skip)


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1))
def test_valid_text_never_shows_a_replacement_character(text: str) -> None:
    if "\ufffd" in text or any("\ud800" <= char <= "\udfff" for char in text):
        return
    texts, rest, _ = run(TOKENIZER.encode(text), ignore_eos=True, skip_special_tokens=False)

    assert not any("\ufffd" in piece for piece in texts)
    assert "".join(texts) == text
    assert rest == ""


def test_unfinished_character_appears_only_at_the_end() -> None:
    half = TOKENIZER.encode("🙂")[:-1]

    texts, rest, _ = run(half)

    assert texts == [""] * len(half)
    assert rest == "\ufffd"


def test_end_token_has_no_text() -> None:
    assert run([*TOKENIZER.encode("Hi"), 2], skip_special_tokens=False)[0][-1] == ""
    assert run([*TOKENIZER.encode("Hi"), 2], skip_special_tokens=False, ignore_eos=True)[0][-1] == "<|im_end|>"


def test_stop_token_is_silent_unless_the_client_asks_to_see_it() -> None:
    (full_stop,) = TOKENIZER.encode(".")

    assert run([full_stop], stop_token_ids=(full_stop,))[0] == [""]
    assert run([full_stop], stop_token_ids=(full_stop,), include_stop_str_in_output=True)[0] == ["."]


# ---------------------------------------------------------------- stop strings
def reference(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """First completed stop string wins; of several that end together, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab 🙂", max_size=30),
    st.lists(st.text(alphabet="ab 🙂", min_size=1, max_size=5), min_size=1, max_size=4),
    st.booleans(),
)
def test_stop_strings_are_found_over_token_boundaries(text: str, stops: list[str], include: bool) -> None:
    texts, rest, matched = run(TOKENIZER.encode(text), stop=tuple(stops), include_stop_str_in_output=include)

    assert ("".join(texts) + rest, matched) == reference(text, tuple(stops), include)


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="ab", max_size=40), st.lists(st.integers(1, 6)), st.lists(st.text("ab", min_size=1), min_size=1)
)
def test_matcher_does_not_care_how_the_text_is_cut(text: str, cuts: list[int], stops: list[str]) -> None:
    whole = StopMatcher(stops).feed(text)

    matcher, start, found = StopMatcher(stops), 0, None
    for cut in [*cuts, len(text)]:
        match = matcher.feed(text[start : start + cut])
        if match is not None:
            found = (match.stop, start + match.end)
            break
        start += cut

    assert found == (whole and (whole.stop, whole.end))


def test_text_that_could_become_a_stop_string_is_held_back_and_then_released() -> None:
    ids = [token_id for char in "xENy" for token_id in TOKENIZER.encode(char)]

    texts, rest, matched = run(ids, stop=("END",))

    assert texts == ["x", "", "", "ENy"]
    assert (rest, matched) == ("", None)


def test_held_text_is_released_when_the_choice_ends() -> None:
    ids = [token_id for char in "xEN" for token_id in TOKENIZER.encode(char)]

    assert run(ids, stop=("END",)) == (["x", "", ""], "EN", None)


def test_tokens_after_a_stop_string_have_no_text() -> None:
    ids = [token_id for char in "aSTOPbc" for token_id in TOKENIZER.encode(char)]

    texts, rest, matched = run(ids, stop=("STOP",))

    assert ("".join(texts), rest, matched) == ("a", "", "STOP")


def test_stop_string_within_min_tokens_does_not_count() -> None:
    ids = [token_id for char in "abab" for token_id in TOKENIZER.encode(char)]

    assert run(ids, stop=("ab",), min_tokens=2) == (["a", "b", "", ""], "", "ab")
    assert run(ids, stop=("ba",), min_tokens=2)[2] is None


def test_caller_may_decide_itself_whether_stops_count() -> None:
    (letter,) = TOKENIZER.encode("a")
    text_stream = stream(stop=("a",))

    assert text_stream.push(letter, stops_count=False) == "a"
    assert text_stream.push(letter, stops_count=True) == ""
    assert text_stream.matched_stop == "a"


# ---------------------------------------------------------------- replay
@settings(max_examples=200, deadline=None)
@given(ANY_IDS, st.lists(st.text(alphabet="ab 🙂", min_size=1, max_size=3), max_size=2), st.data())
def test_entries_cut_elsewhere_have_the_same_texts(ids: list[int], stops: list[str], data: st.DataObject) -> None:
    texts, rest, _ = run(ids, stop=tuple(stops))
    cut = data.draw(st.integers(0, len(ids)))

    replayed = stream(stop=tuple(stops))
    first = [replayed.push(token_id) for token_id in ids[:cut]]
    second = [replayed.push(token_id) for token_id in ids[cut:]]

    assert first + second == texts
    assert replayed.finish("stop") == rest


# ---------------------------------------------------------------- the other kind of tokenizer
def test_byte_fallback_tokenizer_streams_the_same_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(byte_fallback_folder(tmp_path))
    ids = tokenizer.encode("ab a🙂 b")
    text_stream = TextStream(tokenizer, SamplingParams())

    texts = [text_stream.push(token_id) for token_id in ids]

    assert "".join(texts) + text_stream.finish("length") == tokenizer.decode(ids) == "ab a🙂 b"


def byte_fallback_folder(folder: Path) -> Path:
    """A tiny tokenizer built like Llama 2's: text pieces, spaces as U+2581, bytes for what is missing."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "b": 258, "▁a": 259}
    backend = Backend(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("reason", ["stop", "length", "cancelled"])
def test_every_end_releases_the_same_rest(reason: str) -> None:
    text_stream = stream(stop=("abc",))
    for token_id in TOKENIZER.encode("ab"):
        text_stream.push(token_id)

    assert text_stream.finish(reason) == "ab"
