"""all-MiniLM-L6-v2 in NumPy: sentence embeddings with `fusedattn.attention` in all six layers."""
