"""Draw results: ``python bench/plot.py bench/results/cpu.json``; writes the tables in the docs too."""
