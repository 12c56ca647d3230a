"""How a mutant is planted: a subclass of the subject, or methods that take the place of its own."""

from kit_subject import Attention

from fusedattn.testing import EVERYTHING

MUTANTS = {}


def mutant(name=None, **options):
    """Register a mutant; options go to `Kernel`."""

    def register(cls):
        label = name or cls.__name__
        MUTANTS[label] = (cls, {"supports": EVERYTHING, **options})
        return cls

    return register


def replace(name, **methods):
    """Register a mutant that replaces methods of the subject."""
    mutant()(type(name, (Attention,), methods))
