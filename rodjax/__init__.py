"""rodjax: continuous-time models of optimizers at the edge of stability."""

from rodjax import flows
from rodjax.dynamics import dynamics
from rodjax.integrate import descend, integrate
from rodjax.window import Window, warm_up, midpoint
