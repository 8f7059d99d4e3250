"""The contract between hosts, tracker and boards. Imports nothing, so that every floor can use its parts."""
