"""The checks at the door: what passes here is sound in itself, whatever state the session is in.

Nothing here reads or changes a session. A refusal is a typed error and has no effect.
"""
