"""The wire: kedge.v1 messages and services."""
