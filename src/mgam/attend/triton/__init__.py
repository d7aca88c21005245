"""The Triton backend: one kernel a file, each beside the reference that judges it.

Importing this package does not import triton; `backend` does so when it is first used.
"""
