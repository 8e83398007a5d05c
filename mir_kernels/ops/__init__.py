"""The operations, a folder each, all alike (see README.md). `OPERATIONS` lists them for `mir_kernels.backends`."""

from mir_kernels.ops import frechet, moca, moments, sqrtm

OPERATIONS = (*moca.OPERATIONS, *moments.OPERATIONS, *sqrtm.OPERATIONS, *frechet.OPERATIONS)
