"""Images: ViT by convolution and by reshape (nnx), residual networks (nnx and linen), a U-Net (plain dict).

Shape letters: B batch, Y and X space, C channels, P patches, D embed.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.base import ZooModel, b, cross_entropy, draw, g, table, w

SIDE, COLOURS, CLASSES = 16, 3, 24


def _images(rng: np.random.Generator, global_batch: int) -> dict[str, np.ndarray]:
    return {
        "i": rng.normal(size=(global_batch, SIDE, SIDE, COLOURS)).astype(np.float32),
        "o": rng.integers(0, CLASSES, (global_batch,)).astype(np.int32),
    }


def _nnx_functions(make: Any) -> Any:
    """(init, apply) of an nnx module without state besides its parameters."""

    def init(rng):
        return nnx.state(make(nnx.Rngs(rng)), nnx.Param)

    def apply(params, *args):
        graph = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        return nnx.merge(graph, params)(*args)

    return init, apply


class _Encoder(nnx.Module):
    """A block of ViT: norm, attention with three-dimensional kernels, norm, hidden layer."""

    def __init__(self, embed: int, heads: int, hidden: int, rngs: nnx.Rngs):
        self.zeb = nnx.LayerNorm(embed, rngs=rngs)
        self.yak = nnx.MultiHeadAttention(heads, embed, decode=False, rngs=rngs)
        self.cow = nnx.LayerNorm(embed, rngs=rngs)
        self.rat = nnx.Linear(embed, hidden, rngs=rngs)
        self.ant = nnx.Linear(hidden, embed, rngs=rngs)

    def __call__(self, x):
        x = x + self.yak(self.zeb(x))
        return x + self.ant(nnx.gelu(self.rat(self.cow(x))))


class _ViT(nnx.Module):
    """Patches of 4 x 4 by a strided convolution, or by reshape, transpose and a product."""

    def __init__(self, by_convolution: bool, rngs: nnx.Rngs):
        embed, patches = 32, (SIDE // 4) ** 2
        self.by_convolution = by_convolution
        if by_convolution:
            self.sip = nnx.Conv(COLOURS, embed, (4, 4), strides=4, padding="VALID", rngs=rngs)
        else:
            self.sip = nnx.Linear(16 * COLOURS, embed, rngs=rngs)
        self.cup = nnx.Param(0.5 * jax.random.normal(rngs.params(), (1, 1, embed)))
        self.bag = nnx.Param(0.5 * jax.random.normal(rngs.params(), (1, patches + 1, embed)))
        self.lot = nnx.List([_Encoder(embed, 4, 48, rngs) for _ in range(2)])
        self.key = nnx.LayerNorm(embed, rngs=rngs)
        self.arm = nnx.Linear(embed, CLASSES, rngs=rngs)

    def __call__(self, image_BYXC):
        B = image_BYXC.shape[0]
        if self.by_convolution:
            x = self.sip(image_BYXC).reshape(B, -1, 32)
        else:
            x = image_BYXC.reshape(B, SIDE // 4, 4, SIDE // 4, 4, COLOURS).transpose(0, 1, 3, 2, 4, 5)
            x = self.sip(x.reshape(B, (SIDE // 4) ** 2, 16 * COLOURS))
        x = jnp.concatenate([jnp.broadcast_to(self.cup[...], (B, 1, 32)), x], axis=1) + self.bag[...]
        for layer in self.lot:
            x = layer(x)
        return self.arm(self.key(x[:, 0]))


def _vit(name: str, by_convolution: bool) -> ZooModel:
    init, apply = _nnx_functions(lambda rngs: _ViT(by_convolution, rngs))

    def loss(params, batch, rng):
        del rng
        return cross_entropy(apply(params, batch["i"]), batch["o"])

    block_roles = {
        **{f"yak/{m}/kernel": ("embed", "heads", "head_dim") for m in ("query", "key", "value")},
        "yak/out/kernel": ("heads", "head_dim", "embed"),
        "zeb/scale": ("embed",),
        "rat/kernel": ("embed", "mlp"),
        "rat/bias": ("mlp",),
        "ant/kernel": ("mlp", "embed"),
    }
    block_specs = {
        **{f"yak/{m}/kernel": (None, "tensor", None) for m in ("query", "key", "value")},
        **{f"yak/{m}/bias": ("tensor", None) for m in ("query", "key", "value")},
        "yak/out/kernel": ("tensor", None, None),
        "yak/out/bias": (None,),
        "zeb/scale": (None,),
        "rat/kernel": (None, "tensor"),
        "rat/bias": ("tensor",),
        "ant/kernel": ("tensor", None),
        "ant/bias": (None,),
    }
    return ZooModel(
        name,
        init,
        loss,
        _images,
        expected_roles={
            "cup": (None, None, "embed"),
            "bag": (None, None, "embed"),
            "sip/kernel": (None, None, None, "embed") if by_convolution else (None, "embed"),
            "arm/kernel": ("embed", None),
            **{f"lot/{i}/{k}": v for i in range(2) for k, v in block_roles.items()},
        },
        megatron={
            "cup": (None, None, None),
            "bag": (None, None, None),
            **{f"lot/{i}/{k}": v for i in range(2) for k, v in block_specs.items()},
        },
        notes="nnx; a class token is concatenated to 16 patches: length 17 divides by nothing",
    )


def vit_conv(name: str) -> ZooModel:
    """ViT with patches by convolution."""
    return _vit(name, True)


def vit_reshape(name: str) -> ZooModel:
    """ViT with patches by reshape and transpose."""
    return _vit(name, False)


class _BatchNorm(nnx.Module):
    """Training mode: statistics over batch and space."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.m = nnx.Param(1.0 + 0.1 * jax.random.normal(rngs.params(), (channels,)))
        self.a = nnx.Param(0.1 * jax.random.normal(rngs.params(), (channels,)))

    def __call__(self, x):
        mean = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
        var = jnp.var(x, axis=(0, 1, 2), keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * self.m[...] + self.a[...]


class _Residual(nnx.Module):
    """Two 3 x 3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, before: int, after: int, stride: int, rngs: nnx.Rngs):
        self.ray = nnx.Conv(before, after, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.eel = _BatchNorm(after, rngs)
        self.cod = nnx.Conv(after, after, (3, 3), use_bias=False, rngs=rngs)
        self.bee = _BatchNorm(after, rngs)
        if before != after:
            self.fly = nnx.Conv(before, after, (1, 1), strides=stride, use_bias=False, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.eel(self.ray(x)))
        h = self.bee(self.cod(h))
        return nnx.relu(h + (self.fly(x) if hasattr(self, "fly") else x))


class _ResNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.tin = nnx.Conv(COLOURS, 16, (3, 3), rngs=rngs)
        self.gas = nnx.List([_Residual(16, 16, 1, rngs), _Residual(16, 32, 2, rngs)])
        self.air = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.tin(x))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for layer in self.gas:
            x = layer(x)
        return self.air(x.mean(axis=(1, 2)))


def resnet(name: str) -> ZooModel:
    """Residual network with batch statistics, strides, max pooling."""
    init, apply = _nnx_functions(_ResNet)

    def loss(params, batch, rng):
        del rng
        return cross_entropy(apply(params, batch["i"]), batch["o"])

    return ZooModel(
        name, init, loss, _images, notes="nnx; means over the whole batch, so per-shard statistics would be wrong"
    )


class _GroupNormNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), name="sea")(x)
        for name, channels, stride in (("ash", 16, 1), ("oak", 32, 2)):
            h = nn.Conv(channels, (3, 3), strides=stride, name=f"{name}_w")(
                nn.relu(nn.GroupNorm(4, name=f"{name}_q")(x))
            )
            h = nn.Conv(channels, (3, 3), name=f"{name}_e")(nn.relu(nn.GroupNorm(4, name=f"{name}_p")(h)))
            if x.shape != h.shape:
                x = nn.Conv(channels, (1, 1), strides=stride, name=f"{name}_a")(x)
            x = x + h
        x = nn.avg_pool(x, (2, 2), strides=(2, 2)).mean(axis=(1, 2))
        return nn.Dense(CLASSES, name="bud")(x)


def resnet_group(name: str) -> ZooModel:
    """Residual network, norm first, with group normalisation and average pooling (linen)."""
    module = _GroupNormNet()

    def init(rng):
        return module.init(rng, jnp.zeros((1, SIDE, SIDE, COLOURS)))["params"]

    def loss(params, batch, rng):
        del rng
        return cross_entropy(module.apply({"params": params}, batch["i"]), batch["o"])

    return ZooModel(name, init, loss, _images, notes="linen; channels are reshaped into groups")


def _conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def unet(name: str) -> ZooModel:
    """Denoiser: down by stride, up by resize and by transposed convolution, skips concatenated, time embedded."""

    def kernel(side: int, before: int, after: int):
        return w(side, side, before, after, fan_in=side * side * before)

    def unit(before: int, after: int):
        return {
            "v": kernel(3, before, after),
            "t": w(32, after),
            "b": b(after),
            "g": g(after),
            "c": kernel(3, after, after),
        }

    def init(rng):
        leaves = {
            "yew": w(20, 32),
            "fir": w(32, 32),
            "zip": kernel(3, COLOURS, 8),
            "hub": unit(8, 16),
            "web": kernel(3, 16, 16),
            "jam": unit(16, 24),
            "log": kernel(3, 24, 24),
            "mud": unit(24, 24),
            "ore": kernel(2, 24, 24),
            "pit": unit(48, 16),
            "rug": unit(32, 16),
            "bus": kernel(1, 16, COLOURS),
        }
        return draw(rng, leaves)

    def apply_unit(p, x, time):
        h = jax.nn.silu(_conv(x, p["v"]) + (time @ p["t"])[:, None, None, :] + p["b"])
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-5) * p["g"]
        return jax.nn.silu(_conv(h, p["c"])) + h

    def loss(params, batch, rng):
        time_key, noise_key = jax.random.split(rng)
        image = batch["i"]
        time = jax.random.uniform(time_key, (image.shape[0],))
        noise = jax.random.normal(noise_key, image.shape)
        keep = jnp.cos(time * jnp.pi / 2)[:, None, None, None]
        noisy = keep * image + jnp.sqrt(1 - keep**2) * noise

        angle = time[:, None] * jnp.exp(jnp.linspace(0.0, 5.0, 10))[None, :]
        time = jax.nn.silu(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1) @ params["yew"]) @ params["fir"]

        x = _conv(noisy, params["zip"])
        skip_1 = apply_unit(params["hub"], x, time)
        x = _conv(skip_1, params["web"], stride=2)
        skip_2 = apply_unit(params["jam"], x, time)
        x = _conv(skip_2, params["log"], stride=2)
        x = apply_unit(params["mud"], x, time)
        x = jax.lax.conv_transpose(x, params["ore"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = apply_unit(params["pit"], jnp.concatenate([x, skip_2], axis=-1), time)
        x = jax.image.resize(x, (x.shape[0], SIDE, SIDE, x.shape[-1]), "nearest")
        x = apply_unit(params["rug"], jnp.concatenate([skip_1, x], axis=-1), time)
        return jnp.mean((_conv(x, params["bus"]) - noise) ** 2)

    return ZooModel(
        name,
        init,
        loss,
        _images,
        notes="noise is drawn inside the loss; channels of skips are segments of a concatenation",
    )


def patches_mixer(name: str) -> ZooModel:
    """MLP-Mixer: products over patches and over channels in turn; space is an axis of the weights."""
    patches, embed = 16, 32
    block = {
        "o": g(embed),
        "u": w(patches, 24),
        "n": w(24, patches),
        "i": g(embed),
        "c": w(embed, 48),
        "a": w(48, embed),
    }

    def init(rng):
        return draw(rng, {"v": w(48, embed), "p": table(patches, embed), "b": [block] * 2, "h": w(embed, CLASSES)})

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale

    def loss(params, batch, rng):
        del rng
        x = batch["i"].reshape(-1, 4, 4, 4, 4, COLOURS).transpose(0, 1, 3, 2, 4, 5).reshape(-1, patches, 48)
        x = x @ params["v"] + params["p"]
        for p in params["b"]:
            h = norm(x, p["o"]).swapaxes(1, 2)
            x = x + (jax.nn.gelu(h @ p["u"]) @ p["n"]).swapaxes(1, 2)
            x = x + jax.nn.gelu(norm(x, p["i"]) @ p["c"]) @ p["a"]
        return cross_entropy(x.mean(1) @ params["h"], batch["o"])

    roles = {"o": ("embed",), "c": ("embed", "mlp"), "a": ("mlp", "embed")}
    return ZooModel(
        name,
        init,
        loss,
        _images,
        expected_roles={"p": (None, "embed"), **{f"b/{i}/{k}": v for i in range(2) for k, v in roles.items()}},
        notes="patches are a dimension of weights",
    )
