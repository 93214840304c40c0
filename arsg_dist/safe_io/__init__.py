"""Files, documents and text from outside, and processes, handled in one place each.

Everything in this package treats what it reads as written by a stranger, and every directory as one that somebody may
have prepared: docs/security.md says what follows. It is the ground of all other packages and imports none of them.
"""
