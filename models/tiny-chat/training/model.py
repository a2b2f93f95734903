"""The model in training: the same parameters and results as transformers' LlamaForCausalLM.

float32 weights, bfloat16 arithmetic.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from training.looking_back import start_looking_back
from training.shape import CONFIG, PADDED_LENGTHS

# Up to this length plain matrix products are much faster on a CPU than the fused attention.
MAX_PLAIN_LENGTH = 160


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        y = x.float()
        scale = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"])
        return (y * scale * self.weight).bfloat16()


class Linear(nn.Linear):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.bfloat16())


def rotate(x, cos, sin):
    """Rotary position embedding, half rotation; `x` is `[..., tokens, head_dim]`."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).bfloat16()


class Attention(nn.Module):
    def __init__(self, hidden_size, num_heads, num_kv_heads, head_dim):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = Linear(hidden_size, num_heads * head_dim)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim)
        self.o_proj = Linear(num_heads * head_dim, hidden_size)

    def forward(self, x, cos, sin, mask):
        batch, length, _ = x.shape
        group = self.num_heads // self.num_kv_heads
        q = rotate(self._heads(self.q_proj(x), self.num_heads), cos, sin)
        k = rotate(self._heads(self.k_proj(x), self.num_kv_heads), cos, sin)
        v = self._heads(self.v_proj(x), self.num_kv_heads)
        if length <= MAX_PLAIN_LENGTH:
            rows = q.reshape(batch, self.num_kv_heads, group * length, self.head_dim)
            scores = (rows @ k.transpose(-1, -2)).view(batch, self.num_kv_heads, group, length, length)
            shares = (scores.float() * self.head_dim**-0.5 + mask[:length, :length]).softmax(-1).bfloat16()
            y = (shares.view(batch, self.num_kv_heads, group * length, length) @ v).view(
                batch, self.num_heads, length, self.head_dim
            )
        else:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))

    def _heads(self, x, num_heads):
        batch, length, _ = x.shape
        return x.view(batch, length, num_heads, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj, self.up_proj = Linear(hidden_size, intermediate_size), Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config["hidden_size"]
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size), RMSNorm(size)
        self.self_attn = Attention(
            size, config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        )
        self.mlp = MLP(size, config["intermediate_size"])

    def forward(self, x, cos, sin, mask):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Tied embeddings; parameter names as in the checkpoint."""

    def __init__(self, config):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = RMSNorm(config["hidden_size"])
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 0.6)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
        frequencies = 1 / config["rope_theta"] ** (torch.arange(0, config["head_dim"], 2) / config["head_dim"])
        angles = torch.outer(torch.arange(max(PADDED_LENGTHS)).float(), frequencies)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.mask = torch.triu(torch.full((MAX_PLAIN_LENGTH, MAX_PLAIN_LENGTH), float("-inf")), 1)
        start_looking_back(self.model, config, frequencies)

    def forward(self, x, weights):
        """Sum of the weighted losses of the tokens with a weight; `x`, `weights`: `[batch, length]`."""
        length = x.shape[1] - 1
        h = self.model.embed_tokens(x[:, :-1]).bfloat16()
        cos, sin = self.cos[:length], self.sin[:length]
        for layer in self.model.layers:
            h = layer(h, cos, sin, self.mask)
        weights = weights[:, 1:].reshape(-1)
        keep = weights.nonzero().squeeze(1)
        h = self.model.norm(h.reshape(-1, h.shape[-1])[keep])
        logits = F.linear(h, self.model.embed_tokens.weight.bfloat16()).float()
        losses = F.cross_entropy(logits, x[:, 1:].reshape(-1)[keep], reduction="none")
        return (losses * weights[keep]).sum()
