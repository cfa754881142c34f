"""Dense networks as plain dicts, and one with loops, branches and custom gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from zoo.base import ZooModel, b, draw, g, layer_norm, table, w


def _regression(features: int, targets: int):
    def make_batch(rng: np.random.Generator, global_batch: int) -> dict[str, np.ndarray]:
        return {
            "p": rng.normal(size=(global_batch, features)).astype(np.float32),
            "q": rng.normal(size=(global_batch, targets)).astype(np.float32),
        }

    return make_batch


def _dense(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    return x @ p["u"] + p["t"]


def plain(name: str) -> ZooModel:
    """Four layers of different widths, executed foo, bar, qux, baz."""
    sizes = {"foo": (24, 32), "bar": (32, 48), "qux": (48, 40), "baz": (40, 16)}

    def init(rng):
        return draw(rng, {k: {"u": w(*shape), "t": b(shape[1])} for k, shape in sizes.items()})

    def loss(params, batch, rng):
        del rng
        x = batch["p"]
        for k in ("foo", "bar", "qux"):
            x = jnp.tanh(_dense(x, params[k]))
        return jnp.mean((_dense(x, params["baz"]) - batch["q"]) ** 2)

    return ZooModel(
        name, init, loss, _regression(24, 16), notes="any alternation of split columns and split rows is legal"
    )


def equal(name: str) -> ZooModel:
    """Hidden layers of equal width, equal to the batch too (8): no two of the five axes of size 8 are the same."""

    def init(rng):
        return draw(rng, [{"u": w(8, 8), "t": b(8)} for _ in range(4)] + [{"u": w(8, 16), "t": b(16)}])

    def loss(params, batch, rng):
        del rng
        x = batch["p"]
        for p in params[:-1]:
            x = jax.nn.relu(_dense(x, p))
        return jnp.mean((_dense(x, params[-1]) - batch["q"]) ** 2)

    return ZooModel(name, init, loss, _regression(8, 16))


def residual(name: str) -> ZooModel:
    """x + f(norm(x)), with dropout inside the blocks: one embed axis and a hidden axis per block."""

    def init(rng):
        block = {"zu": g(32), "ab": b(32), "qi": {"u": w(32, 48), "t": b(48)}, "fo": {"u": w(48, 32), "t": b(32)}}
        return draw(rng, {"c": w(24, 32), "a": {"0": block, "1": block}, "b": {"u": w(32, 16), "t": b(16)}})

    def loss(params, batch, rng):
        x = batch["p"] @ params["c"]
        for i, key in enumerate(jax.random.split(rng, 2)):
            p = params["a"][str(i)]
            h = jax.nn.gelu(_dense(layer_norm(x, p["zu"], p["ab"]), p["qi"]))
            h = jnp.where(jax.random.bernoulli(key, 0.9, h.shape), h / 0.9, 0.0)
            x = x + _dense(h, p["fo"])
        return jnp.mean((_dense(x, params["b"]) - batch["q"]) ** 2)

    block_roles = {
        "zu": ("embed",),
        "ab": ("embed",),
        "qi/u": ("embed", "mlp"),
        "qi/t": ("mlp",),
        "fo/u": ("mlp", "embed"),
        "fo/t": ("embed",),
    }
    block_megatron = {
        "zu": (None,),
        "ab": (None,),
        "qi/u": (None, "tensor"),
        "qi/t": ("tensor",),
        "fo/u": ("tensor", None),
        "fo/t": (None,),
    }
    return ZooModel(
        name,
        init,
        loss,
        _regression(24, 16),
        expected_roles={
            "c": (None, "embed"),
            "b/u": ("embed", None),
            **{f"a/{i}/{k}": v for i in range(2) for k, v in block_roles.items()},
        },
        megatron={f"a/{i}/{k}": v for i in range(2) for k, v in block_megatron.items()},
        notes="dropout",
    )


@jax.custom_vjp
def _clipped(x: jax.Array) -> jax.Array:
    """The identity; its gradient is clipped."""
    return x


def _clipped_fwd(x):
    return x, None


def _clipped_bwd(_, cotangent):
    return (jnp.clip(cotangent, -0.01, 0.01),)


_clipped.defvjp(_clipped_fwd, _clipped_bwd)


@jax.custom_jvp
def _soft_sign(x: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.abs(x))


@_soft_sign.defjvp
def _soft_sign_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    scale = 1.0 + jnp.abs(x)
    return x / scale, t / (scale * scale)


def fixed_point(name: str) -> ZooModel:
    """An embedding that is refined by a loop: while, fori, cond, switch, custom_vjp and custom_jvp in one model."""

    def init(rng):
        leaves = {"m": table(64, 32), "z": w(32, 32), "k": w(32, 48), "e": w(48, 32), "d": b(32), "a": w(32, 16)}
        return draw(rng, leaves)

    def largest_singular_value(weight):
        """Power iteration to convergence, without a gradient."""
        weight = jax.lax.stop_gradient(weight)

        def cond(carry):
            i, _, change = carry
            return (i < 20) & (change > 1e-3)

        def body(carry):
            i, v, _ = carry
            new = weight.T @ (weight @ v)
            new = new / jnp.linalg.norm(new)
            return i + 1, new, jnp.max(jnp.abs(new - v))

        v = jnp.full((weight.shape[1],), weight.shape[1] ** -0.5)
        _, v, _ = jax.lax.while_loop(cond, body, (0, v, jnp.inf))
        return jnp.linalg.norm(weight @ v)

    def loss(params, batch, rng):
        del rng
        x = params["m"][batch["i"]].mean(axis=1)
        z = params["z"] / largest_singular_value(params["z"])

        def refine(_, h):
            return _clipped(0.5 * _soft_sign(h @ z + x + params["d"]))

        h = jax.lax.fori_loop(0, 5, refine, jnp.zeros_like(x))
        wide = _soft_sign(h @ params["k"])
        wide = jax.lax.cond(jnp.mean(wide) > 0.0, lambda a: a * 1.5, lambda a: a - 0.1, wide)
        wide = jax.lax.switch(jnp.sum(batch["i"]) % 3, [lambda a: a, jnp.sin, jax.nn.relu6], wide)
        h = h + wide @ params["e"]
        return jnp.mean((h @ params["a"] - batch["q"]) ** 2)

    def make_batch(rng: np.random.Generator, global_batch: int) -> dict[str, np.ndarray]:
        return {
            "i": rng.integers(0, 64, (global_batch, 12)).astype(np.int32),
            "q": rng.normal(size=(global_batch, 16)).astype(np.float32),
        }

    return ZooModel(
        name,
        init,
        loss,
        make_batch,
        expected_roles={"m": ("vocab", "embed"), "k": ("embed", "mlp"), "e": ("mlp", "embed"), "z": ("embed", "embed")},
        megatron={"m": ("tensor", None), "k": (None, "tensor"), "e": ("tensor", None), "d": (None,)},
        notes="while_loop, fori_loop, cond, switch, custom_vjp, custom_jvp; a square weight in the residual stream",
    )
