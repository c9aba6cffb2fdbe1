"""A scan over layers that computes once what does not depend on the layer.

XLA:GPU leaves such work in the loop, and attention has much of it: how a ragged batch is divided
among workers is a dozen small kernels, which would run again for every layer.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval


def scan_layers(layer: Callable[[Any, Any], Any], carry: Any, xs: Any) -> Any:
    """The last carry of `carry = layer(carry, x)` over the leading axis of every array in `xs`.

    The layer is traced once and cut in two: what follows from arrays of the caller alone, which
    `layer` has in its closure, runs before the loop.
    """
    values, tree = jax.tree.flatten((carry, jax.tree.map(lambda x: x[0], xs)))
    one = lambda *values: jax.tree.leaves(layer(*jax.tree.unflatten(tree, values)))
    traced = jax.make_jaxpr(one)(*values)
    whole = ClosedJaxpr(partial_eval.convert_constvars_jaxpr(traced.jaxpr), ())
    varies = [False] * len(traced.consts) + [True] * len(values)
    once, each, _, kept = partial_eval.partial_eval_jaxpr_nounits(whole, varies, instantiate=True)
    outcome = jaxpr_as_fun(once)(*traced.consts)
    constants = outcome[len(outcome) - len(kept) :]

    def step(carry, x):
        new = jaxpr_as_fun(each)(*constants, *jax.tree.leaves((carry, x)))
        return jax.tree.unflatten(jax.tree.structure(carry), new), None

    return jax.lax.scan(step, carry, xs)[0]
