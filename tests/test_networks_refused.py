"""What the networks refuse, with the argument's name."""

import math

import pytest
from flax import nnx
from helpers import unchecked

from rodjax.problems import clusters, cnn, mlp, sorting, supervised, vit


def images(shape=(4, 4, 2)):
    return clusters(6, shape=shape, classes=3)


class WithDropout(nnx.Module):
    def __init__(self, key):
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(key))
        self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(key))

    def __call__(self, x):
        return self.linear(self.dropout(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mlp(images(), widths=(0,)), "widths=0"),
        (lambda: mlp(images(), activation="softsin"), "softsin"),
        (lambda: mlp(images(), loss="hinge"), "hinge"),
        (lambda: mlp(images(), chunk=0), "chunk=0"),
        (lambda: cnn(images(), channels=()), "channels"),
        (lambda: cnn(images(), channels=(2, 2, 2)), "fewer layers"),
        (lambda: cnn(images(shape=(16,))), "height, width, channels"),
        (lambda: vit(images(), patch=3), "patch=3"),
        (lambda: vit(images(), patch=2, width=5, heads=2), "heads=2"),
        (lambda: vit(images(), depth=True), "depth=True"),
        (lambda: sorting(3, width=5), "width=5"),
        (lambda: sorting(3, length=0), "length=0"),
        (lambda: clusters(3, noise=-1.0), "noise=-1.0"),
        (lambda: clusters(3, noise=math.nan), "noise=nan"),
        (lambda: clusters(0), "n=0"),
        (
            lambda: supervised(WithDropout, images(shape=(2,))),
            "dropout.* is no parameter",
        ),
        (
            lambda: supervised(
                lambda k: nnx.Linear(2, 4, rngs=nnx.Rngs(k)), images(shape=(2,))
            ),
            r"\(6, 4\)",
        ),
    ],
)
def test_bad_arguments_are_named(make, words):
    with unchecked(), pytest.raises(ValueError, match=words):
        make()
