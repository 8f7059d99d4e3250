"""The .kdg artifact: manifest, members, digests. Standard library only."""
