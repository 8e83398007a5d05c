"""`python -m modality_integration`, which torchrun can start: `torchrun -m modality_integration compute ...`."""

from modality_integration.app.cli import main

main(prog_name="mir")
