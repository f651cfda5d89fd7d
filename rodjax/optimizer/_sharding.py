"""Which shardings of parameters are served."""

import jax
from jax.sharding import AxisType
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import PyTree


def check_mesh(tree: PyTree, name: str) -> None:
    """Raise `ValueError` for arrays on a mesh with explicit axes.

    Outside of `jax.set_mesh` JAX itself does not compile `jnp.zeros_like` of such an
    array, and neither Optax nor diffrax is made for them.
    """
    for path, leaf in tree_leaves_with_path(tree):
        if AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types:
            raise ValueError(
                f"{name}{keystr(path)} is sharded over a mesh with explicit axes, "
                "which jax.make_mesh makes by default. Make the mesh with "
                "axis_types=(jax.sharding.AxisType.Auto,) * the number of its axes: "
                "parameters then keep their shardings"
            )
