"""Entry point for `python -m modality_integration` and `torchrun -m modality_integration compute ...`."""

from modality_integration.app.entry import main

main()
