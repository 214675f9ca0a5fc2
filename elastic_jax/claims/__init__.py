"""The claims of the method: what was published, what is asked, what rows say.

Every claim has thresholds, which stand in `claim.py` and nowhere else, and two
functions of its rows: findings, each with a verdict, and cells, the numbers of its
table and plot. Where two arms are compared, their problems are paired.
"""

from elastic_jax.claims.claim import ASKED, Cell, Claim
from elastic_jax.claims.table import CLAIMS

__all__ = ["ASKED", "CLAIMS", "Cell", "Claim"]
