"""What clients, agents and tracker share of security: join strings, credentials, a device's identity, signatures.

Nothing here imports `cryptography` before it is needed: boards do without.
"""
