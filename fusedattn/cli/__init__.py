"""The command line; needs the extra ``cli``. Start at `fusedattn.cli.app`."""
