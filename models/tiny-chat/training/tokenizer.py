"""Trains and checks the byte-level BPE tokenizer. The result is the same every time."""

import json
from pathlib import Path

import corpus

from training.shape import CONFIG, SPECIAL_TOKENS

# The usual split of byte-level BPE chat models: words with one leading space, single digits, punctuation, line ends.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRAINING_SEED = 17
NUM_CONVERSATIONS = 40_000


def make_tokenizer(out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `out`, and check them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    conversations = corpus.stream(TRAINING_SEED, NUM_CONVERSATIONS, maxlen=300)
    tokenizer.train_from_iterator(
        (corpus.render(c["messages"], c["tools"]) for c in conversations),
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"],
            special_tokens=SPECIAL_TOKENS,
            min_frequency=4,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert tokenizer.get_vocab_size() == CONFIG["vocab_size"], tokenizer.get_vocab_size()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=1))
    check_tokenizer(out)


def tokenizer_config() -> dict:
    """Contents of tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_bos_token": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": corpus.CHAT_TEMPLATE,
        "added_tokens_decoder": {str(k): {"content": text, **flags} for k, text in enumerate(SPECIAL_TOKENS)},
    }


def check_tokenizer(folder: Path) -> None:
    """It loads with AutoTokenizer, gives any text back, and its template agrees with `corpus.render`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    every_letter = "".join(map(chr, range(1, 0x800)))
    for text in ["héllo  wörld\n\n\tx 123", "日本語 🙂👩‍👩‍👧 ـعربي", every_letter, " a  b ", "\r\n\x00"]:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text, text
    num_checked = 0
    for conversation in corpus.stream(3, 3000):
        for end in (len(conversation["messages"]), len(conversation["messages"]) - 1):
            messages = conversation["messages"][:end]
            if not messages or messages[-1]["role"] == "system":
                continue
            add_prompt = messages[-1]["role"] != "assistant"
            expected = corpus.render(messages, conversation["tools"], add_prompt)
            found = tokenizer.apply_chat_template(
                messages, tools=conversation["tools"], add_generation_prompt=add_prompt, tokenize=False
            )
            assert found == expected, (found, expected)
            num_checked += 1
    print(f"tokenizer ok: {len(tokenizer)} entries, chat template agrees on {num_checked} conversations")
