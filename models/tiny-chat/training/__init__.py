"""Trains tiny-chat from nothing on the conversations of `corpus`, on a CPU.

    python -m training tokenizer --out stage1                # train the byte-level BPE tokenizer
    python -m training train --out stage1 --steps 1400       # train; run the same command again to resume
    python -m training train --out model --init stage1/model.safetensors --first-step 1400 --steps 3400
    python -m training export --out model                    # write the bf16 safetensors and the config files

The learning rate is constant after a short warm-up and falls along a half cosine in the last `--decay` steps. Sequences
are not packed: conversations of similar length share a batch, so every conversation starts at position 0, as it does
when the model is served. Only assistant tokens carry the full loss weight; the text of short prompts gets a small one.
"""
