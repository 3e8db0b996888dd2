"""The public shapes, named as in the contract. Absent values are left out of responses.

A route's are in the module of the same name as its own, `errors.py` apart.
"""
