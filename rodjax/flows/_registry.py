"""The registry of flows: what is said of each of them, in one place.

The command line, `rodjax list`, the table of contracts that every flow is tested by,
the accuracy benchmark and the tables of the documentation are made from it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from rodjax.flows import _central
from rodjax.flows._central import central
from rodjax.flows._covariance import covariance
from rodjax.flows._edge import edge
from rodjax.flows._flow import Flow
from rodjax.flows._gradient import gradient
from rodjax.flows._igr import igr
from rodjax.flows._modulated import modulated
from rodjax.flows._principal import principal
from rodjax.flows._rod import rod
from rodjax.flows._stable import stable
from rodjax.flows._third_order import third_order

#: Whom a flow serves: any optimizer, those without momentum whose preconditioner is a
#: positive diagonal matrix (gradient descent, RMSProp), or gradient descent alone.
Serves = Literal["any", "preconditioned", "gradient descent"]


class Record(NamedTuple):
    """What is said of a flow.

    - `name`: of the function in `rodjax.flows`; `build`: the function itself.
    - `models`: in a line, what it models; `source`: the paper, or "ours".
    - `serves`: which optimizers it accepts; `optimizers`: the same for readers.
    - `state`, `cost`: the size of its state, and what one call of the vector field
      evaluates, with d parameters and k directions; `misses`: what it does not model.
    - `floor`, `rank`: whether it has a least oscillation, and a number of directions.
    - `reports`: name -> long name of what it reports beside the metrics.

    ```python
    >>> import rodjax as rj
    >>> [name for name, record in rj.flows.REGISTRY.items() if record.floor]
    ['modulated', 'edge', 'covariance']

    ```
    """

    name: str
    build: Callable[..., Flow]
    models: str
    serves: Serves
    optimizers: str
    state: str
    cost: str
    misses: str
    source: str
    floor: bool = False
    rank: bool = False
    reports: Mapping[str, str] = MappingProxyType({})


_RECORDS = (
    Record(
        name="stable",
        build=stable,
        models="the naive limit dz/dt = Phi(z) - z, the baseline",
        serves="any",
        optimizers="any",
        state="z, the optimizer's state",
        cost="1",
        misses="the edge of stability",
        source="Cohen et al., arXiv 2410.24206",
    ),
    Record(
        name="rod",
        build=rod,
        models="centre and extent of the rod between consecutive iterates; `rank=k`: a "
        "bundle of k rods (ours)",
        serves="any",
        optimizers="any; k > 1 without momentum",
        state="z and k of its phase",
        cost="4 k",
        misses="a single rod points along the drift before the onset and misses it; 3 "
        "catch it, in float64",
        source="Regis, Chewi, arXiv 2602.01480, 2605.06821",
        rank=True,
    ),
    Record(
        name="modulated",
        build=modulated,
        models="z[t] = c + (-1)^t delta, c and delta smooth",
        serves="any",
        optimizers="any",
        state="z and one of its phase",
        cost="4",
        misses="period-two oscillations only; with momentum it must estimate what the "
        "run still carries at the onset",
        source="ours",
        floor=True,
    ),
    Record(
        name="edge",
        build=edge,
        models="centre, unit direction and radius of one oscillation",
        serves="any",
        optimizers="any (published for GD)",
        state="z, one of its phase, 1",
        cost="2 and 1 hvp (of the update map, if not GD)",
        misses="a second unstable direction; how the loss flattens along the "
        "oscillation damps nothing",
        source="Marion, arXiv 2606.18080 (constants reconstructed)",
        floor=True,
    ),
    Record(
        name="central",
        build=central,
        models="time average, the oscillation's covariance chosen so as to hold the "
        "eigenvalues at the edge",
        serves="preconditioned",
        optimizers="GD, RMSProp and scalar RMSProp, bias correction and schedules "
        "included",
        state="z and k d",
        cost="1, k hvp and up to k (k + 1)/2 third-derivative products",
        misses="delayed onsets and overshoot: it turns at the edge at once; momentum",
        source="Cohen et al., arXiv 2410.24206",
        rank=True,
        reports=_central.REPORTS,
    ),
    Record(
        name="covariance",
        build=covariance,
        models="gradient descent on the free energy L + <H, Sigma>/2, Sigma of rank k",
        serves="gradient descent",
        optimizers="GD",
        state="d and k d",
        cost="1, 2 k hvp and k third-derivative products",
        misses="how the loss flattens along the oscillation",
        source="Chodron de Courcel, arXiv 2606.05326 (reconstructed)",
        floor=True,
        rank=True,
    ),
    Record(
        name="gradient",
        build=gradient,
        models="gradient flow, -eta g",
        serves="gradient descent",
        optimizers="GD",
        state="d",
        cost="1",
        misses="steps of finite size",
        source="textbook",
    ),
    Record(
        name="igr",
        build=igr,
        models="implicit gradient regularization: gradient flow on L + eta/4 |g|^2",
        serves="gradient descent",
        optimizers="GD",
        state="d",
        cost="1 and 1 hvp",
        misses="the edge of stability",
        source="Barrett, Dherin, arXiv 2009.11162",
    ),
    Record(
        name="third_order",
        build=third_order,
        models="gradient flow corrected to one order more",
        serves="gradient descent",
        optimizers="GD",
        state="d",
        cost="1, 2 hvp and 1 third-derivative product",
        misses="the edge of stability",
        source="Rosca et al., arXiv 2302.01952",
    ),
    Record(
        name="principal",
        build=principal,
        models="GD's own rate log(1 - eta l)/l along every eigenvector: exact on "
        "quadratics, sign flips and divergence included",
        serves="gradient descent",
        optimizers="GD",
        state="exact: 2 d; `rank=k`: d and k d",
        cost="exact: the Hessian, complex; else 1 and k + 1 hvp",
        misses="exact is for small problems and analytic losses; `rank=k` is real, "
        "climbs beyond 2/eta, and does not come back as GD does",
        source="Rosca et al., arXiv 2302.01952",
        rank=True,
    ),
)

#: Name -> record of every flow.
REGISTRY: Mapping[str, Record] = MappingProxyType({r.name: r for r in _RECORDS})


def table() -> str:
    """The registry as a Markdown table.

    ```python
    >>> import rodjax as rj
    >>> print(rj.flows.table().splitlines()[0])
    | flow | what it models | optimizers | state | cost per call | what it misses | source |

    ```
    """  # noqa: E501
    titles = ["flow", "what it models", "optimizers", "state", "cost per call"]
    rows = [[*titles, "what it misses", "source"], ["---"] * 7]
    for r in REGISTRY.values():
        text = [r.models, r.optimizers, r.state, r.cost, r.misses, r.source]
        rows.append([f"`{r.name}`", *(cell.replace("|", "\\|") for cell in text)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
