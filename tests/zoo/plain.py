"""Modules of plain torch, as people write them outside of transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.inputs import TOKENS, noise, token_ids
from tests.zoo.sizes import HEADS, INNER, LAYERS, VOCABULARY, WIDTH


class Stack(nn.Module):
    """Embedding, blocks, norm and head around whatever a block is."""

    def __init__(self, block: Callable[[], nn.Module], shared: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        one = block()
        self.blocks = nn.ModuleList([one if shared else block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class MixerBlock(nn.Module):
    """MLP-Mixer: a product over tokens, then one over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens = nn.Sequential(nn.Linear(TOKENS, 32), nn.ReLU(), nn.Linear(32, TOKENS))
        self.channels = nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.before(x).mT).mT
        return x + self.channels(self.after(x))


class AttentionBlock(nn.Module):
    """nn.MultiheadAttention in front of a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.mix = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n1(x)
        x = x + self.mix(h, h, h, need_weights=False)[0]
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class RawBlock(nn.Module):
    """Weights without modules, multiplied from either side."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.w_in = nn.Parameter(torch.empty(WIDTH, 2 * INNER))
        self.w_out = nn.Parameter(torch.empty(WIDTH, INNER))

    def forward(self, x: Tensor) -> Tensor:
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain
        gate, value = (h @ self.w_in).chunk(2, -1)
        return x + torch.einsum("bti,oi->bto", torch.sigmoid(gate) * value, self.w_out)


class SoftmaxBlock(nn.Module):
    """Attention spelled out, with one key and value head, and a norm on queries."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_q = nn.LayerNorm(WIDTH), nn.LayerNorm(16)
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_kv = nn.Linear(WIDTH, 32, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = self.norm_q(self.to_q(h).unflatten(-1, (HEADS, 16)).transpose(1, 2))
        k, v = self.to_kv(h).split(16, -1)
        weights = (q @ k[:, None].mT / 4).softmax(-1)
        return x + self.out((weights @ v[:, None]).transpose(1, 2).flatten(2))


class RepeatedUseBlock(nn.Module):
    """One linear used twice on inputs of one norm, and one bilinear gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.other(self.twice(h) * torch.tanh(self.twice(h.flip(1))))


class ConvNet(nn.Module):
    """Convolutions, batch norm, pooling, and linears at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip
        self.classify = nn.Sequential(nn.Linear(128, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x).flatten(1))


class Depthwise(nn.Module):
    """A gated block with a causal depthwise convolution in its value path."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.project = nn.Linear(WIDTH, 2 * INNER, bias=False)
        self.conv = nn.Conv1d(INNER, INNER, 4, groups=INNER, padding=3)
        self.back = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.project(self.norm(x)).chunk(2, -1)
        value = self.conv(value.mT)[..., : x.shape[1]].mT
        return x + self.back(F.silu(gate) * value)


class Recurrent(nn.Module):
    """An LSTM between linears."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.leave = nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(self.lstm(self.enter(x))[0])


class Router(nn.Module):
    """Two experts, chosen softly; all of them see every token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.choose = nn.Linear(WIDTH, 2)
        self.up = nn.ModuleList([nn.Linear(WIDTH, INNER) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(INNER, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        shares = self.choose(h).softmax(-1)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            x = x + shares[..., i : i + 1] * down(F.relu(up(h)))
        return x


class Translator(nn.Module):
    """nn.Transformer from embeddings to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Transformer(WIDTH, HEADS, 1, 1, INNER, norm_first=True, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.body(self.embed(source), self.embed(target)))


def _encoder(first: bool, activation: str = "relu") -> nn.Module:
    return nn.TransformerEncoderLayer(
        WIDTH, HEADS, INNER, norm_first=first, activation=activation, batch_first=True
    )


_IDS = {"ids": token_ids()}
#: Name -> what makes the module, and its inputs.
MODULES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "torch_encoder_pre_norm": (lambda: Stack(lambda: _encoder(True)), _IDS),
    "torch_encoder_post_norm": (lambda: Stack(lambda: _encoder(False)), _IDS),
    "torch_encoder_gelu": (lambda: Stack(lambda: _encoder(True, "gelu")), _IDS),
    "torch_transformer": (Translator, {"source": token_ids(), "target": token_ids(seed=2)}),
    "torch_attention_gated": (lambda: Stack(AttentionBlock), _IDS),
    "torch_shared_block": (lambda: Stack(AttentionBlock, shared=True), _IDS),
    "torch_mixer": (lambda: Stack(MixerBlock), _IDS),
    "torch_raw_products": (lambda: Stack(RawBlock), _IDS),
    "torch_softmax_attention": (lambda: Stack(SoftmaxBlock), _IDS),
    "torch_linear_used_twice": (lambda: Stack(RepeatedUseBlock), _IDS),
    "torch_conv_net": (ConvNet, {"x": noise(1, 3, 16, 16)}),
    "torch_depthwise": (lambda: Stack(Depthwise), _IDS),
    "torch_lstm": (lambda: Stack(Recurrent), _IDS),
    "torch_soft_experts": (lambda: Stack(Router), _IDS),
}
