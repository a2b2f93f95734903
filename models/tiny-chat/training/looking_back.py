"""Starting weights that can already look things up; everything else starts at random.

Learning to copy from random weights takes much longer than all the rest, so some heads start with a purpose.

    dimension 0            the same for all tokens
    dimensions 1-127       the token itself (embedding)
    dimensions 128-255     what the heads of layer 0, which look one and two tokens back, saw there

Layers 1 to 3 have heads that look for places where the token before (in layer 3: two before) is the one read now, and
copy what stands there.
"""

import torch

EMBEDDING_STD = 0.08
NUM_FAST = 5  # rotations that turn too fast to be of use over long distances, and just right for the next token


@torch.no_grad()
def start_looking_back(model, config, frequencies):
    """Overwrite the embedding and parts of the attention of layers 0 to 3. Draws from torch's random numbers."""
    head_dim = config["head_dim"]
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    embedding = model.embed_tokens.weight
    embedding.normal_(std=EMBEDDING_STD)
    embedding[:, 0], embedding[:, 128:] = 4 * EMBEDDING_STD, embedding[:, 128:] * 0.1

    def basis():
        return torch.linalg.qr(torch.randn(127, head_dim))[0].T

    read, slow = [basis() for _ in range(2)], torch.ones(head_dim // 2)
    slow[:NUM_FAST] = 0.3
    slow = torch.cat((slow, slow))[:, None]
    identity = torch.eye(head_dim)
    for layer_idx in range(4):
        attention = model.layers[layer_idx].self_attn
        query, key = attention.q_proj.weight, attention.k_proj.weight
        for kv_head in range(2):
            rows = slice(kv_head * head_dim, kv_head * head_dim + head_dim)
            key[rows] = 0
            attention.v_proj.weight[rows] = 0
            value = read[kv_head] if layer_idx == 0 else basis()
            attention.v_proj.weight[rows, 1:128] = value
            first = 128 + head_dim * kv_head
            notes = [slice(first + 64 * back, first + 64 * back + head_dim) for back in range(2)]
            for back in range(2 if layer_idx == 0 else 1):
                head = slice((kv_head * group + back) * head_dim, (kv_head * group + back + 1) * head_dim)
                query[head] = 0
                if layer_idx == 0:
                    angle = frequencies[:NUM_FAST] * (back + 1)
                    key[rows.start : rows.start + NUM_FAST, 0] = 1.9
                    query[head.start : head.start + NUM_FAST, 0] = 1.9 * angle.cos()
                    half = head.start + head_dim // 2
                    query[half : half + NUM_FAST, 0] = -1.9 * angle.sin()
                    attention.o_proj.weight[notes[back], head] = identity * 0.06
                else:
                    key[rows, notes[layer_idx == 3]] = 1.7 * slow * identity
                    if layer_idx == 3:
                        query[head, notes[0]] = 1.7 * slow * identity
                    else:
                        query[head, 1:128] = 1.7 * slow * read[kv_head]
                    attention.o_proj.weight[1:128, head] = 0.1 * value.T
