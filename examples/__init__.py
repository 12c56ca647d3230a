"""Programs that use fusedattn: `python -m examples.<name>` from the repository root."""
