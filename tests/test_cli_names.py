"""What the command line's names stand for."""

import cli_runner
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.cli import _names as choices
from rodjax.flows import PrincipalState


def rank_of(text, rank=None, size=4):
    """The number of directions that a flow is given; `None` if it is exact."""
    sgd = rj.dynamics(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2))
    flow = choices.flow(text, sgd, size=size, rank=rank)
    init = lambda w: flow.init(w, lr=None, key=jax.random.key(0))
    state = jax.eval_shape(init, jnp.ones(4))
    if isinstance(state, PrincipalState):
        return None
    # Beside the mean, of a leading axis of the rank.
    return jax.tree.leaves(state[1])[0].shape[0]


@pytest.mark.parametrize(
    ("text", "rank", "expected"),
    [
        ("rod", None, 1),
        ("rod", 2, 2),
        ("rod:3", 2, 3),
        ("central", None, 3),
        ("central:1", None, 1),
        ("covariance", 1, 1),
    ],
)
def test_a_rank_of_its_own_comes_first_and_the_default_last(text, rank, expected):
    assert rank_of(text, rank) == expected


def test_the_principal_flow_is_exact_where_it_is_small():
    assert rank_of("principal", size=choices.EXACT) is None
    assert rank_of("principal", size=choices.EXACT + 1) == choices.DIRECTIONS
    assert rank_of("principal", 2, size=choices.EXACT) == 2
    assert rank_of("principal:1", 2, size=choices.EXACT + 1) == 1


# Networks are built by test_networks.py too.
SLOW = {
    "digits-cnn",
    "digits-vit",
    "mnist1d-mlp",
    "mnist1d-cnn",
    "clusters-mlp",
    "sorting",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in choices.PROBLEMS
        if "cifar10" not in name
    ],
)
def test_every_named_problem_builds(name):
    problem = choices.problem(name, "float32")
    assert np.isfinite(jax.jit(problem.loss)(problem.params))


def test_cifar10_by_path(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (6, 3073), np.uint8)
    records[:, 0] = np.arange(6)
    (tmp_path / "data_batch_1.bin").write_bytes(records.tobytes())
    settings = {
        "path": str(tmp_path),
        "n": 5,
        "widths": (3,),
        "classes": (0, 1, 2, 3, 4),
    }
    problem = choices.problem("cifar10-mlp", "float32", settings)
    assert problem.params["layers"][0]["kernel"].shape == (3072, 3)
    assert problem.params["layers"][2]["kernel"].shape == (3, 5)


def test_list_has_a_line_for_everything():
    result = cli_runner.invoke("list")
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    names = [line[0] for line in lines if len(line) == 2]
    for name in (*choices.PROBLEMS, *choices.OPTIMIZERS, *choices.FLOWS):
        assert names.count(name) == 1
    assert max(map(len, result.stdout.splitlines())) < 90
