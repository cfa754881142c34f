"""Calls of `experts`: what they compute, that a jaxpr shows them, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding_rules import ExpertsCall, MeshShape, experts, make_layout, trace
from sharding_rules.mixture import experts_call

B, L, D, E, J, F = 2, 4, 8, 4, 2, 16


def operands(gated=True, seed=0):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(B, L, D)), rng.uniform(size=(B, L, J))
    expert = np.argsort(rng.normal(size=(B, L, E)), axis=-1)[..., :J]
    kernels = [rng.normal(size=s) for s in ((E, D, F), (E, F, D), (E, D, F))][: 2 + gated]
    return [jnp.asarray(a, jnp.float32) for a in (x,)] + [
        jnp.asarray(expert, jnp.int32),
        *(jnp.asarray(a, jnp.float32) for a in (weight, *kernels)),
    ]


@pytest.mark.parametrize("gated", [True, False])
def test_each_token_gets_the_weighted_sum_of_its_experts(gated):
    x, expert, weight, up, down, *gate = map(np.asarray, operands(gated))
    want = np.zeros_like(x)
    for b, t, j in np.ndindex(B, L, J):
        e = expert[b, t, j]
        h = x[b, t] @ up[e]
        h = np.maximum(x[b, t] @ gate[0][e], 0) * h if gated else np.maximum(h, 0)
        want[b, t] += weight[b, t, j] * (h @ down[e])
    got = experts(*operands(gated), activation=jax.nn.relu)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_jaxpr_tells_the_call_and_not_its_derivatives():
    args = operands()
    jaxpr = jax.make_jaxpr(lambda *a: experts(*a, activation=jax.nn.silu))(*args)
    (eqn,) = jaxpr.jaxpr.eqns
    assert eqn.params["name"] == "experts_gated_silu"
    assert experts_call(eqn) == ExpertsCall(jax.nn.silu, True)
    _, push = jax.linearize(lambda x: experts(x, *args[1:], activation=jax.nn.silu), args[0])
    pushed = jax.make_jaxpr(push)(args[0])
    assert [experts_call(e) for e in pushed.jaxpr.eqns] == [None] * len(pushed.jaxpr.eqns)


def test_functions_of_one_name_are_two_calls():
    def silu(x):
        return -x

    args = operands()
    found = {}
    for activation in (jax.nn.silu, silu):
        (eqn,) = jax.make_jaxpr(lambda *a, f=activation: experts(*a, activation=f))(*args).jaxpr.eqns
        found[eqn.params["name"]] = experts_call(eqn).activation
    assert list(found.values()) == [jax.nn.silu, silu]


def test_what_does_not_go_together_is_refused():
    x, expert, weight, up, down, gate = operands()
    with pytest.raises(ValueError, match=r"kernels \(4, 16, 8\), \(4, 16, 8\)"):
        experts(x, expert, weight, down, down, activation=jax.nn.relu)
    with pytest.raises(ValueError, match=r"tokens \(2, 4, 8\), numbers of experts \(2, 4, 2\) and weights \(2, 4, 1\)"):
        experts(x, expert, weight[..., :1], up, down, gate, activation=jax.nn.relu)


def test_a_router_lies_as_its_tokens_where_experts_are_split():
    def loss(params, batch):
        x = batch["x"] @ params["in"]
        gates = jax.nn.softmax(x @ params["router"])
        weight, expert = jax.lax.top_k(gates, J)
        y = experts(x, expert, weight, params["up"], params["down"], activation=jax.nn.relu)
        return jnp.square(y).sum() + jnp.square(gates).sum()

    shapes = {"in": (D, D), "router": (D, E), "up": (E, D, F), "down": (E, F, D)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    batch = {"x": jax.ShapeDtypeStruct((8, L, D), jnp.float32)}
    layout = make_layout(trace(loss, params, batch, names=("params", "batch")), MeshShape(data=2, expert=4))
    rows = list(layout.assignment.compute)
    roles = {row.role: row.name for row in layout.rows.rows}
    assert rows.index(roles["batch"]) < rows.index(roles["expert"])
    assert layout.specs("params")["up"][0] == "expert"
