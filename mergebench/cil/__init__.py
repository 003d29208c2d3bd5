"""Tasks that come one after the other, each with an adapter of its own on one frozen backbone (MOS, arXiv:2412.09441).

Tasks are counted from 0 in code and from 01 in file names; adapter -1 is none, the backbone alone. Classes stand in
the order of the tasks.
"""
