"""Shardings by logical axes, and kv heads for more devices than there are."""

from dataclasses import replace

import jax
import pytest
from jax.sharding import PartitionSpec as P

from converters import open_checkpoint
from tests.checkpoints import GOLDENS
from xlinfer.config import MoE
from xlinfer.mesh import (
    default_expert_parallel_size,
    make_mesh,
    replicate_kv_heads,
    sharding,
)

MOE = MoE(
    layers=(0, 1, 2),
    num_experts=6,
    num_experts_per_tok=2,
    intermediate_size=12,
    scores="softmax",
    selection_bias=False,
    groups=None,
    norm_topk_prob=True,
    weight_multiplier=1.0,
    shared_gate=True,
    bias=False,
    scaled_inputs=False,
    shared_intermediate_size=50,
)


@pytest.fixture
def config():
    return open_checkpoint(GOLDENS / "llama").config


def test_a_mesh_has_the_devices_asked_for():
    mesh = make_mesh(2, jax.devices()[2:], expert_parallel_size=1)
    assert dict(mesh.shape) == {"sequence": 1, "expert": 1, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()[2:]
    assert dict(make_mesh(2).shape) == {"sequence": 1, "expert": 2, "tensor": 1}
    mesh = make_mesh(2, expert_parallel_size=1, sequence_parallel_size=2)
    assert dict(mesh.shape) == {"sequence": 2, "expert": 1, "tensor": 2}


@pytest.mark.parametrize(
    "n, message",
    [(5, "there are 4 devices"), (0, "at least 1"), (-1, "at least 1"), (True, "integer")],
)
def test_meshes_that_are_refused(n, message):
    with pytest.raises(ValueError, match=f"tensor_parallel_size.*{message}"):
        make_mesh(n)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"expert_parallel_size": 3}, "expert_parallel_size is 3; it must divide .* 4,"),
        ({"expert_parallel_size": 0}, "expert_parallel_size is 0; it must be at least 1"),
        ({"sequence_parallel_size": 2}, "4 x sequence_parallel_size 2, but there are 4 devices"),
        ({"sequence_parallel_size": 0}, "sequence_parallel_size is 0; it must be at least 1"),
    ],
)
def test_sizes_that_do_not_go_together(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(4, **sizes)


BOTH = ("expert", "tensor")


@pytest.mark.parametrize(
    "axes, shape, want",
    [
        (("layers", "hidden", "heads", "head_dim"), (3, 32, 4, 8), P(None, None, BOTH, None)),
        (("ffw", "hidden"), (48, 32), P(BOTH, None)),
        (("vocab", "hidden"), (160, 32), P(BOTH, None)),
        (("vocab", "hidden"), (161, 32), P(None, None)),
        (("experts", "expert_ffw", "hidden"), (6, 48, 32), P("expert", "tensor", None)),
    ],
)
def test_experts_are_split_over_one_axis_and_what_is_inside_them_over_the_other(axes, shape, want):
    assert sharding(make_mesh(4, expert_parallel_size=2), axes, shape).spec == want


@pytest.mark.parametrize("tokens, want", [(64, P("sequence")), (63, P(None))])
def test_weights_are_whole_along_the_tokens_of_a_step(tokens, want):
    mesh = make_mesh(2, expert_parallel_size=1, sequence_parallel_size=2)
    assert sharding(mesh, ("tokens",), (tokens,)).spec == want
    assert sharding(mesh, ("ffw", "hidden"), (48, 32)).spec == P("tensor", None)


@pytest.mark.parametrize(
    "axes, shape, want",
    [
        (("layers", "hidden", "heads", "head_dim"), (3, 32, 4, 8), P(None, None, "tensor", None)),
        (("hidden", "kv_heads", "head_dim"), (32, 4, 8), P(None, "tensor", None)),
        (("ffw", "hidden"), (48, 32), P("tensor", None)),
        (("vocab", "hidden"), (160, 32), P("tensor", None)),
        (("vocab", "hidden"), (161, 32), P(None, None)),
        ((None, "heads"), (3, 4), P(None, "tensor")),
        (("experts", "expert_ffw", "hidden"), (8, 48, 32), P(None, "tensor", None)),
    ],
)
def test_sharding(axes, shape, want):
    assert sharding(make_mesh(4, expert_parallel_size=1), axes, shape).spec == want


@pytest.mark.parametrize(
    "axes, shape, message",
    [
        (("ffw",), (50,), "'ffw' of size 50 does not divide among 4"),
        (("colour",), (8,), "no sharding rule for the axis 'colour'"),
        (("experts", "hidden"), (6, 32), "'experts' of size 6 does not divide among 4"),
        (("ffw",), (48, 2), "2 axes"),
    ],
)
def test_shardings_that_are_refused(axes, shape, message):
    with pytest.raises(ValueError, match=message):
        sharding(make_mesh(4), axes, shape)


@pytest.mark.parametrize("n, want", [(1, 2), (2, 2), (4, 4)])
def test_kv_heads_are_repeated_up_to_the_devices(config, n, want):
    assert (config.num_heads, config.num_kv_heads) == (4, 2)
    assert replicate_kv_heads(config, make_mesh(n)) == replace(config, num_kv_heads=want)


@pytest.mark.parametrize(
    "changes, n, message",
    [
        ({}, 3, "4 attention heads.*Below it fit: 1, 2$"),
        ({"intermediate_size": 50}, 4, "50 .intermediate_size.*Below it fit: 1, 2$"),
        ({"num_heads": 6, "num_kv_heads": 3}, 2, "3 kv heads"),
        ({"moe": MOE}, 4, "50 .the shared expert's size.*Below it fit: 1, 2$"),
        ({"num_heads": 12, "num_kv_heads": 3}, 4, "3 kv heads.*Below it fit: 1, 3$"),
    ],
)
def test_sizes_that_do_not_divide(config, changes, n, message):
    with pytest.raises(ValueError, match=f"tensor_parallel_size {n} .*{message}"):
        replicate_kv_heads(replace(config, **changes), make_mesh(n))


@pytest.mark.parametrize(
    "changes, experts, message",
    [
        ({}, 4, "6 experts are not a multiple of it. These fit: 1, 2$"),
        ({"intermediate_size": 6}, 1, "6 .an expert's size. is .*the 4 devices. These fit: 2$"),
        ({"intermediate_size": 7}, 4, "6 experts are not a multiple of it. None does$"),
    ],
)
def test_experts_that_do_not_divide(config, changes, experts, message):
    moe = replace(MOE, shared_intermediate_size=None, **changes)
    mesh = make_mesh(4, expert_parallel_size=experts)
    with pytest.raises(ValueError, match=f"expert_parallel_size {experts} of .* 4 .*{message}"):
        replicate_kv_heads(replace(config, moe=moe), mesh)


@pytest.mark.parametrize("experts, devices, want", [(8, 16, 8), (128, 8, 8), (6, 4, 2), (5, 4, 1)])
def test_as_many_devices_as_can_have_experts_of_their_own(config, experts, devices, want):
    moe = replace(config, moe=replace(MOE, num_experts=experts))
    assert default_expert_parallel_size(moe, devices) == want
    assert default_expert_parallel_size(config, devices) == 1


def test_an_encoder_decoders_tokens_are_not_split():
    config = open_checkpoint(GOLDENS / "t5").config
    mesh = make_mesh(2, sequence_parallel_size=2)
    with pytest.raises(ValueError, match=r"sequence_parallel_size 2: .*encoder-decoder models .t5"):
        replicate_kv_heads(config, mesh)
