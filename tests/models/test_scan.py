"""The scan over layers: the same numbers as a plain one, with less inside of the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlinfer.models.scan import scan_layers


def weights() -> dict:
    w = np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32) / 3
    return {"w": jnp.asarray(w), "layer": jnp.arange(4)}


def run(scan, x, angle_D):
    def layer(carry, one):
        x, count = carry
        table_D = jnp.sin(angle_D) * jnp.cos(angle_D)  # of no layer
        return jnp.tanh(x @ one["w"]) * table_D[None], count + one["layer"]

    return scan(layer, (x, jnp.int32(0)), weights())


def plainly(layer, carry, xs):
    return jax.lax.scan(lambda c, x: (layer(c, x), None), carry, xs)[0]


X, ANGLE = jnp.linspace(-1, 1, 24).reshape(3, 8), jnp.linspace(0, 3, 8)


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_it_is_a_scan(how):
    got, want = (how(lambda x, a, s=s: run(s, x, a))(X, ANGLE) for s in (scan_layers, plainly))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert got[1] == want[1] == 6


def test_it_can_be_differentiated_and_mapped():
    for argument in (0, 1):
        got, want = (
            jax.vmap(jax.grad(lambda x, a, s=s: run(s, x, a)[0].sum(), argument), (0, None))(
                jnp.stack([X, 2 * X]), ANGLE
            )
            for s in (scan_layers, plainly)
        )
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_what_no_layer_changes_is_outside_of_the_loop():
    def inside(scan) -> set[str]:
        jaxpr = jax.make_jaxpr(lambda x, a: run(scan, x, a))(X, ANGLE)
        loop = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
        return {e.primitive.name for e in loop.params["jaxpr"].eqns}

    assert {"sin", "cos"} <= inside(plainly)
    assert not {"sin", "cos"} & inside(scan_layers) and "tanh" in inside(scan_layers)
