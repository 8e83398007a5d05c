"""The operations, one folder each with the same layout (README.md). `OPERATIONS` lists them for `backends()`."""

from mir_kernels.ops import frechet, moca, moments, sqrtm

OPERATIONS = (*moca.OPERATIONS, *moments.OPERATIONS, *sqrtm.OPERATIONS, *frechet.OPERATIONS)
