"""Attention inside other people's automatic differentiation; import the module you need."""
