"""Sizes of the model and the alphabet of its tokenizer: what the files of the model folder say as well."""

CONFIG = {
    "vocab_size": 2560,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 704,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 4096,
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Batches are padded to these lengths, so that few shapes are compiled.
PADDED_LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792)
