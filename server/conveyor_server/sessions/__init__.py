"""Sessions: their numbering, their leases and the table that holds them.

No I/O, no threads, no clock of their own.
"""
