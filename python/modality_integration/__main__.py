"""`python -m modality_integration`, which torchrun can start: `torchrun -m modality_integration compute ...`."""

from modality_integration.app.entry import main

main()
