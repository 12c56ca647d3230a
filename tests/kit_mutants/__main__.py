"""Markdown table: the law that kills each mutant, and how many calls that took."""

from kit_kills import KILLED_BY

from fusedattn.testing import Kernel
from fusedattn.testing.check import select_laws, try_law
from kit_mutants import MUTANTS

print("| mutant | killed by | calls |\n|---|---|---|")
for name, killer in KILLED_BY.items():
    factory, options = MUTANTS[name]
    options = {**options, "supports": frozenset(options["supports"])}
    law = next(law for law in select_laws(None) if law.name == killer)
    outcome = try_law(law, Kernel(factory(), **options), 100, 0, shrink=False)
    calls = outcome.examples if outcome.status == "failed" else "not within 100"
    print(f"| {name} | {law.name} | {calls} |")
