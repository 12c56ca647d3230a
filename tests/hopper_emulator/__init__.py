"""Runs the Hopper kernel without a GPU: its PTX is interpreted, its threads are Python threads.

`machine` has the threads of a block and who runs next, `memory` shared and global memory, barriers
and TMA, `matrix` the asynchronous products of warpgroups, `instructions` what each instruction of
PTX does, `programs` makes Python functions of inline PTX, `run` launches the kernel on a problem.
"""
